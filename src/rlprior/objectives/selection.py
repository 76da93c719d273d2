"""The head of each row: the columns that hold the k largest logits, ties included.

Shape suffixes: N rows, V vocabulary, B blocks of columns, C candidate columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MIN_TWO_LEVEL_VOCABULARY = 8192  # measured on CPU: below it counting is faster, above it block maxima are
MAX_BLOCK_COLUMNS = 16
NUM_SPARE_BLOCKS = (
    8  # room for ties with the k-th logit; where there are more, the head is told for all columns
)
NUM_COUNTING_PASSES = 10  # resolves about 95% of rows; the rest take the exact path


@dataclass(frozen=True)
class Candidates:
    """Columns among which the `top_k` largest logits of each row are.

    Attributes:
        values_NC: logits of the candidates; where all columns are candidates, the logits themselves.
        columns_NC: their columns, or None for all.
        maxima_NB: largest logit of each block of columns, where candidates were chosen by blocks.
    """

    logits_NV: Tensor
    top_k: int
    values_NC: Tensor
    columns_NC: Tensor | None = None
    maxima_NB: Tensor | None = None

    @property
    def max_N1(self) -> Tensor:
        """Largest logit of each row."""
        return self.values_NC.amax(1, keepdim=True)

    @property
    def largest_Nk(self) -> Tensor:
        """The `top_k` largest logits of each row in any order, with -inf where there are fewer."""
        num_columns = self.values_NC.shape[1]
        largest = self.values_NC.topk(min(self.top_k, num_columns), dim=1, sorted=False).values
        return functional.pad(largest, (0, max(self.top_k - num_columns, 0)), value=-torch.inf)


@dataclass(frozen=True)
class Head:
    """The head of each row, `{j : z_j >= threshold}`.

    Attributes:
        threshold_N1: not necessarily a logit itself.
        is_member_NC: 1 and 0 in the dtype of the logits, for each candidate column.
        columns_NC: the candidate columns, or None for all.
        values_NC: their logits.
    """

    threshold_N1: Tensor
    is_member_NC: Tensor
    columns_NC: Tensor | None
    values_NC: Tensor


def find_candidates(logits_NV: Tensor, top_k: int) -> Candidates:
    """Columns that hold the `top_k` largest logits of each row, few where V is large.

    The blocks with the largest maxima hold the largest values: a larger value elsewhere would make its block's maximum
    larger too. Columns j, j + B, j + 2 B, ... form block j, which makes the maxima a vectorised pass.
    """
    num_rows, num_columns = logits_NV.shape
    block_columns = min(MAX_BLOCK_COLUMNS, num_columns // (8 * top_k))
    num_chosen = top_k + NUM_SPARE_BLOCKS
    if (
        num_columns < MIN_TWO_LEVEL_VOCABULARY
        or block_columns < 2
        or num_columns < block_columns * num_chosen
    ):
        return Candidates(logits_NV, top_k, logits_NV)
    num_blocks = num_columns // block_columns
    covered = num_blocks * block_columns
    maxima_NB = logits_NV[:, :covered].view(num_rows, block_columns, num_blocks).amax(1)
    blocks_NK = maxima_NB.topk(num_chosen, dim=1, sorted=False).indices
    offsets = torch.arange(block_columns, device=logits_NV.device) * num_blocks
    columns_NC = (blocks_NK[:, None, :] + offsets[None, :, None]).view(num_rows, -1)
    rest = torch.arange(covered, num_columns, device=logits_NV.device).expand(num_rows, -1)
    columns_NC = torch.cat([columns_NC, rest], dim=1)
    return Candidates(logits_NV, top_k, logits_NV.gather(1, columns_NC), columns_NC, maxima_NB)


def head_threshold(candidates: Candidates, scratch_NV: Tensor) -> Tensor:
    """Threshold t [N, 1] such that the head of a row is `{j : z_j >= t}`: its `top_k` largest logits and what ties with them.

    t need not be a logit itself. A logit of -inf is never in the head, and where fewer than `top_k` are finite the head
    is all of them.

    Args:
        candidates: of float32 or float64 logits.
        scratch_NV: any contents, shaped like the logits and of their dtype, overwritten.

    >>> logits = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, -torch.inf, -torch.inf, -torch.inf]])
    >>> logits >= head_threshold(find_candidates(logits, 2), torch.empty_like(logits))
    tensor([[ True, False,  True,  True],
            [ True, False, False, False]])
    """
    values_NC = candidates.values_NC
    if candidates.top_k >= candidates.logits_NV.shape[1]:
        kth_N = values_NC.new_full(values_NC.shape[:1], -torch.inf)
    elif candidates.columns_NC is None:
        kth_N = _threshold_by_counting(values_NC, candidates.top_k, scratch_NV)
    else:
        kth_N = _kth_largest(values_NC, candidates.top_k)
    return _exclude_infinite(kth_N[:, None])


def merged_threshold(largest_PNk: Tensor) -> Tensor:
    """`head_threshold` of rows in P parts, from the `Candidates.largest_Nk` of each part."""
    values_NC = largest_PNk.transpose(0, 1).flatten(1)
    return _exclude_infinite(_kth_largest(values_NC, largest_PNk.shape[2])[:, None])


def _exclude_infinite(threshold_N1: Tensor) -> Tensor:
    """The same threshold, but out of reach of -inf."""
    return threshold_N1.clamp_min(torch.finfo(threshold_N1.dtype).min)


def find_head(
    candidates: Candidates, threshold_N1: Tensor, scratch_NV: Tensor, *, for_all: bool = False
) -> Head:
    """The head above a threshold, told for the candidates or `for_all` columns; `scratch_NV` may become part of it."""
    spills = False
    if candidates.columns_NC is not None and candidates.maxima_NB is not None:
        num_chosen = candidates.top_k + NUM_SPARE_BLOCKS
        spills = bool(((candidates.maxima_NB >= threshold_N1).sum(1) > num_chosen).any())
    if candidates.columns_NC is None or spills or for_all:
        logits_NV = candidates.logits_NV
        is_member_NV = torch.ge(logits_NV, threshold_N1, out=scratch_NV)
        return Head(threshold_N1, is_member_NV, None, logits_NV)
    values_NC = candidates.values_NC
    return Head(
        threshold_N1, (values_NC >= threshold_N1).to(values_NC.dtype), candidates.columns_NC, values_NC
    )


def _kth_largest(values_NC: Tensor, k: int) -> Tensor:
    """The k-th largest value [N] of each row."""
    return values_NC.topk(k, dim=1, sorted=False).values.amin(1)


def _threshold_by_counting(logits_NV: Tensor, k: int, scratch_NV: Tensor) -> Tensor:
    """Any value that exactly k logits reach, found by regula falsi on the logarithm of the count.

    A pass that counts costs about a fiftieth of `topk`. The rows in which no such value was found (ties, -inf, or a gap too
    narrow for the passes allowed) are solved exactly, so the passes decide the speed and never the result.
    """
    num_columns = logits_NV.shape[1]
    high_N, low_N = logits_NV.amax(1), logits_NV.amin(1)
    log_high_N = torch.zeros_like(high_N)
    log_low_N = torch.full_like(low_N, math.log(num_columns))
    guess_N = _normal_quantile(logits_NV, 1 - k / num_columns, scratch_NV)
    result_N = torch.full_like(high_N, torch.nan)
    for num_passes in range(1, NUM_COUNTING_PASSES + 1):
        count_N = torch.ge(logits_NV, guess_N[:, None], out=scratch_NV).sum(1)
        result_N = torch.where(count_N == k, guess_N, result_N)
        reached_N = count_N >= k
        log_count_N = count_N.clamp_min(0.5).log()
        low_N, log_low_N = (
            torch.where(reached_N, guess_N, low_N),
            torch.where(reached_N, log_count_N, log_low_N),
        )
        high_N, log_high_N = (
            torch.where(reached_N, high_N, guess_N),
            torch.where(reached_N, log_high_N, log_count_N),
        )
        if num_passes % 4 == 3:  # bisect now and then: interpolation alone may creep from one side
            guess_N = (low_N + high_N) / 2
        else:
            fraction_N = (log_high_N - math.log(k)) / (log_high_N - log_low_N)
            guess_N = torch.lerp(high_N, low_N, fraction_N.clamp(0.02, 0.98))
    unresolved = result_N.isnan().nonzero()[:, 0]
    if unresolved.numel():
        result_N[unresolved] = _kth_largest(logits_NV[unresolved], k)
    return result_N


def _normal_quantile(logits_NV: Tensor, level: float, scratch_NV: Tensor) -> Tensor:
    mean_N = logits_NV.mean(1)
    variance_N = torch.mul(logits_NV, logits_NV, out=scratch_NV).mean(1) - mean_N.square()
    deviations = math.sqrt(2) * torch.erfinv(torch.tensor(2 * level - 1, dtype=torch.float64)).item()
    return mean_N + deviations * variance_N.clamp_min(0).sqrt()
