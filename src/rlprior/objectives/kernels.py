# pyright: basic
"""Triton kernels on the logits [R, V] of a chunk: their sums, the exact head, and the gradient in their place.

Logits are float32, bfloat16 or float16; all arithmetic is float32. Rows start at int64 offsets, because R V may pass 2^31.
Sizes that a model has once are compiled in, so that loops and masks have known bounds; a new R or k compiles nothing.
A softcap is applied wherever a logit is read; the head is selected on the logits as they are stored, whose order the
softcap keeps and whose comparison is exact in every kernel, whatever the compiler fuses.

The code keeps to what Triton's interpreter and its compiler both do in the same way: maxima drop nan (the sums do not),
and conditions are masks.

Shape suffixes: R rows of the chunk, V vocabulary, B blocks of columns.
"""

import triton
import triton.language as tl

# Stands in for -inf in products with p = 0; its exponential is 0.
LOWEST_SHIFTED_LOGIT = tl.constexpr(-1e4)
# `_to_key` of the lowest finite float32: a head starts there where fewer than k logits are finite.
LOWEST_KEY = tl.constexpr(-0x7F800000)

SUMS = (
    "max_logit",  # before the softcap
    "reference",  # the same after it, 0 where no logit is finite; e_j = exp(z_j - reference)
    "target_logit",  # z_x
    "other_mass",  # sum of e_j over j != x
    "other_weighted",  # sum of e_j (z_j - reference) over j != x
    "finite_sum",  # sum of z_j - reference over the finite logits
    "num_finite",
    "target_rank",
)
"""Columns of what `sum_rows` writes for each row."""

HEAD_SUMS = (
    "threshold",  # the head is every logit, before the softcap, from here on
    "mass",  # sum of e_j over the head without x
    "weighted",  # sum of e_j (z_j - reference) over the head without x
    "size",
)
"""Columns of what `select_head` writes for each row."""

NUM_SUMS = tl.constexpr(len(SUMS))
NUM_HEAD_SUMS = tl.constexpr(len(HEAD_SUMS))


@triton.jit
def _tanh(x):
    # From exp alone: the name and place of the library's tanh depend on the backend. Near 0 the quotient cancels, and the
    # series up to x^9 is exact to float32 below 1/4.
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    square = x * x
    series = 1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _cap(logits, softcap, HAS_SOFTCAP: tl.constexpr):
    if HAS_SOFTCAP:
        logits = tl.where(logits == float("-inf"), logits, softcap * _tanh(logits / softcap))
    return logits


@triton.jit
def _load(pointers, mask):
    # The fill is chosen after the conversion, in the one dtype that needs no care.
    return tl.where(mask, tl.load(pointers, mask=mask, other=0.0).to(tl.float32), float("-inf"))


@triton.jit
def _shift(logits, reference, softcap, HAS_SOFTCAP: tl.constexpr):
    # Not `maximum`, which would lose a nan.
    shifted = _cap(logits, softcap, HAS_SOFTCAP) - reference
    return tl.where(shifted < LOWEST_SHIFTED_LOGIT, LOWEST_SHIFTED_LOGIT, shifted)


@triton.jit
def _to_key(value, SHIFT: tl.constexpr):
    # Integers in the order of the floats: the bits of negative numbers count backwards.
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _to_value(key, SHIFT: tl.constexpr):
    # The lowest float32 with this key, which bounds the numbers with this key, and no others, from below.
    bits = key << SHIFT
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    # Upper middle; low + high may overflow.
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def sum_rows(
    logits_ptr,
    targets_ptr,
    sums_ptr,
    maxima_ptr,
    softcap,
    NUM_COLUMNS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MAXIMA: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * NUM_COLUMNS
    target = tl.load(targets_ptr + row).to(tl.int32)
    target_logit = tl.load(logits_ptr + target).to(tl.float32)
    blocks = tl.arange(0, BLOCKS)
    offsets = blocks[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    # Sums are kept for each block of the tile and added up once, at the end; only the maximum crosses warps every time.
    top = tl.full((), float("-inf"), tl.float32)
    reference = tl.full((), 0.0, tl.float32)
    mass = tl.zeros((BLOCKS,), tl.float32)
    weighted = tl.zeros((BLOCKS,), tl.float32)
    finite_sum = tl.zeros((BLOCKS,), tl.float32)
    num_finite = tl.zeros((BLOCKS,), tl.int32)
    num_above = tl.zeros((BLOCKS,), tl.int32)
    for start in range(0, NUM_COLUMNS, BLOCKS * COLUMNS):
        columns = start + offsets
        logits = _load(logits_ptr + columns, columns < NUM_COLUMNS)
        maxima = tl.max(logits, axis=1)
        if HAS_MAXIMA:
            block = start // COLUMNS + blocks
            tl.store(maxima_ptr + row * NUM_BLOCKS + block, maxima, mask=block < NUM_BLOCKS)
        new_top = tl.maximum(top, tl.max(maxima, axis=0))
        new_reference = tl.where(new_top == float("-inf"), 0.0, _cap(new_top, softcap, HAS_SOFTCAP))
        # Sums before the first finite logit are 0, whatever they are scaled by.
        change = tl.where(top == float("-inf"), 0.0, reference - new_reference)
        top = new_top
        reference = new_reference
        is_finite = logits > float("-inf")
        above_reference = tl.where(is_finite, _cap(logits, softcap, HAS_SOFTCAP) - reference, 0.0)
        finite_sum += change * num_finite + tl.sum(above_reference, axis=1)
        num_finite += tl.sum(is_finite.to(tl.int32), axis=1)
        change = tl.where(change < LOWEST_SHIFTED_LOGIT, LOWEST_SHIFTED_LOGIT, change)
        shifted = _shift(logits, reference, softcap, HAS_SOFTCAP)
        masses = tl.where(columns == target, 0.0, tl.exp(shifted))
        decay = tl.exp(change)
        weighted = decay * (weighted + change * mass) + tl.sum(masses * shifted, axis=1)
        mass = decay * mass + tl.sum(masses, axis=1)
        num_above += tl.sum((logits > target_logit).to(tl.int32), axis=1)
    sums_ptr += row * NUM_SUMS
    tl.store(sums_ptr, top)
    tl.store(sums_ptr + 1, reference)
    tl.store(sums_ptr + 2, _cap(target_logit, softcap, HAS_SOFTCAP))
    tl.store(sums_ptr + 3, tl.sum(mass, axis=0))
    tl.store(sums_ptr + 4, tl.sum(weighted, axis=0))
    tl.store(sums_ptr + 5, tl.sum(finite_sum, axis=0))
    tl.store(sums_ptr + 6, tl.sum(num_finite, axis=0).to(tl.float32))
    tl.store(sums_ptr + 7, 1 + tl.sum(num_above, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["top_k"])
def select_blocks(
    maxima_ptr,
    sums_ptr,
    selected_ptr,
    num_selected_ptr,
    lowest_key_ptr,
    top_k,
    NUM_BLOCKS: tl.constexpr,
    SHIFT: tl.constexpr,
    MAXIMA: tl.constexpr,
):
    # The k-th largest maximum is a lower bound of the k-th largest logit, and every block with a larger logit reaches it.
    row = tl.program_id(0).to(tl.int64)
    maxima_ptr += row * NUM_BLOCKS
    selected_ptr += row * NUM_BLOCKS
    offsets = tl.arange(0, MAXIMA)
    low = tl.full((), LOWEST_KEY >> SHIFT, tl.int32)
    high = _to_key(tl.load(sums_ptr + row * NUM_SUMS), SHIFT)
    while low < high:
        middle = _middle(low, high)
        level = _to_value(middle, SHIFT)
        counts = tl.zeros((MAXIMA,), tl.int32)
        for start in range(0, NUM_BLOCKS, MAXIMA):
            block = start + offsets
            counts += (_load(maxima_ptr + block, block < NUM_BLOCKS) >= level).to(tl.int32)
        is_reached = tl.sum(counts, axis=0) >= top_k
        low = tl.where(is_reached, middle, low)
        high = tl.where(is_reached, high, middle - 1)
    level = _to_value(low, SHIFT)
    num_selected = tl.full((), 0, tl.int32)
    for start in range(0, NUM_BLOCKS, MAXIMA):
        block = start + offsets
        is_selected = _load(maxima_ptr + block, block < NUM_BLOCKS) >= level
        place = num_selected + tl.cumsum(is_selected.to(tl.int32), axis=0) - 1
        tl.store(selected_ptr + place, block, mask=is_selected)
        num_selected += tl.sum(is_selected.to(tl.int32), axis=0)
    tl.store(num_selected_ptr + row, num_selected)
    tl.store(lowest_key_ptr + row, low)


@triton.jit
def _load_selected(
    logits_ptr,
    selected_ptr,
    places,
    num_selected,
    NUM_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    is_place = places < num_selected
    block = tl.load(selected_ptr + places, mask=is_place, other=0)
    columns = block[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return columns, _load(logits_ptr + columns, is_place[:, None] & (columns < NUM_COLUMNS))


@triton.jit(do_not_specialize=["top_k"])
def select_head(
    logits_ptr,
    targets_ptr,
    sums_ptr,
    selected_ptr,
    num_selected_ptr,
    lowest_key_ptr,
    head_ptr,
    top_k,
    softcap,
    NUM_COLUMNS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * NUM_COLUMNS
    selected_ptr += row * NUM_BLOCKS
    num_selected = tl.load(num_selected_ptr + row)
    offsets = tl.arange(0, BLOCKS)
    low = tl.load(lowest_key_ptr + row)
    high = _to_key(tl.load(sums_ptr + row * NUM_SUMS), SHIFT)
    while low < high:
        middle = _middle(low, high)
        level = _to_value(middle, SHIFT)
        counts = tl.zeros((BLOCKS,), tl.int32)
        start = tl.full((), 0, tl.int32)
        while start < num_selected:
            columns, logits = _load_selected(
                logits_ptr, selected_ptr, start + offsets, num_selected, NUM_COLUMNS, COLUMNS
            )
            counts += tl.sum((logits >= level).to(tl.int32), axis=1)
            start += BLOCKS
        is_reached = tl.sum(counts, axis=0) >= top_k
        low = tl.where(is_reached, middle, low)
        high = tl.where(is_reached, high, middle - 1)
    level = _to_value(low, SHIFT)
    target = tl.load(targets_ptr + row).to(tl.int32)
    reference = tl.load(sums_ptr + row * NUM_SUMS + 1)
    mass = tl.zeros((BLOCKS,), tl.float32)
    weighted = tl.zeros((BLOCKS,), tl.float32)
    size = tl.zeros((BLOCKS,), tl.int32)
    start = tl.full((), 0, tl.int32)
    while start < num_selected:
        columns, logits = _load_selected(
            logits_ptr, selected_ptr, start + offsets, num_selected, NUM_COLUMNS, COLUMNS
        )
        is_head = logits >= level
        shifted = _shift(logits, reference, softcap, HAS_SOFTCAP)
        masses = tl.where(is_head & (columns != target), tl.exp(shifted), 0.0)
        mass += tl.sum(masses, axis=1)
        weighted += tl.sum(masses * shifted, axis=1)
        size += tl.sum(is_head.to(tl.int32), axis=1)
        start += BLOCKS
    head_ptr += row * NUM_HEAD_SUMS
    tl.store(head_ptr, level)
    tl.store(head_ptr + 1, tl.sum(mass, axis=0))
    tl.store(head_ptr + 2, tl.sum(weighted, axis=0))
    tl.store(head_ptr + 3, tl.sum(size, axis=0).to(tl.float32))


@triton.jit
def write_gradient(
    logits_ptr,
    targets_ptr,
    sums_ptr,
    head_ptr,
    head_factor_ptr,
    tail_factor_ptr,
    target_gradient_ptr,
    shift_ptr,
    softcap,
    NUM_COLUMNS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_HEAD: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * NUM_COLUMNS
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < NUM_COLUMNS
    logits = _load(logits_ptr + columns, inside)
    reference = tl.load(sums_ptr + row * NUM_SUMS + 1)
    factor = tl.load(head_factor_ptr + row)
    if HAS_HEAD:
        is_head = logits >= tl.load(head_ptr + row * NUM_HEAD_SUMS)
        factor = tl.where(is_head, factor, tl.load(tail_factor_ptr + row))
    gradient = tl.exp(_shift(logits, reference, softcap, HAS_SOFTCAP)) * factor
    if HAS_SHIFT:
        gradient -= tl.where(logits > float("-inf"), tl.load(shift_ptr + row), 0.0)
    is_target = columns == tl.load(targets_ptr + row).to(tl.int32)
    gradient = tl.where(is_target, tl.load(target_gradient_ptr + row), gradient)
    if HAS_SOFTCAP:
        # Slope of c tanh(z / c), 1 - tanh^2, without its cancellation.
        e = tl.exp(-2 * tl.abs(logits / softcap))
        gradient *= 4 * e / ((1 + e) * (1 + e))
    tl.store(logits_ptr + columns, gradient, mask=inside)
