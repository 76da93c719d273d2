"""The Triton kernels against float64, on inputs made to mislead them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
from tests.objectives.kernel_cases import (
    DEFAULT_TILES,
    DEVICE,
    SETTINGS,
    SHAPING,
    TILES,
    TOLERANCE,
    assert_within_budget,
    check,
    compute,
    evaluate,
    evaluate_exactly,
    misleading_rows,
    set_small_tiles,
    set_tiles,
    small_inputs,
)
from triton.runtime import interpreter

import rlprior.objectives
from rlprior.objectives import (
    CrossEntropy,
    LabelSmoothing,
    RewardShaping,
    SampledReward,
    fused,
    linear_shaped_cross_entropy,
    registry,
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    set_small_tiles(monkeypatch)


def test_every_objective_matches_the_oracle(bench, objective):
    inputs = small_inputs(bench, n=5)
    if isinstance(objective, SampledReward):
        with pytest.raises(ValueError, match="needs an objective that draws no tokens, got SampledReward"):
            compute(bench, objective, inputs, "sum")
        return
    # Rewards of up to 30 amplify the errors of the masses that they multiply.
    check(bench, objective, inputs, tolerance=1e-4)


def test_every_reduction_with_options(bench):
    check(
        bench,
        SHAPING,
        small_inputs(bench, n=3),
        reductions=("none", "sum", "mean"),
        logit_softcap=3.0,
        z_loss=0.01,
    )


@pytest.mark.parametrize("softcap", [30.0, 1e4])
def test_label_smoothing_under_a_softcap(bench, softcap):
    # At 1e4 the cap changes little and a tanh that cancels near 0 would be off by 1e-3.
    check(bench, LabelSmoothing(smoothing=0.1), small_inputs(bench), logit_softcap=softcap)


def test_default_tiles_and_a_prime_vocabulary(bench, monkeypatch):
    set_tiles(monkeypatch, DEFAULT_TILES)
    check(bench, RewardShaping(tail_reward=-0.1, top_k=100), small_inputs(bench, n=2, v=5003))


def head_by_sorting(logits, top_k):
    rows = []
    for row in logits.tolist():
        ranked = sorted((z for z in row if z != -torch.inf), reverse=True)
        last = ranked[min(top_k, len(ranked)) - 1]
        rows.append([z >= last for z in row])
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("dtype", "top_k", "tiles"),
    [
        (torch.float32, 7, (4, 4, 16, 16)),
        (torch.bfloat16, 36, (4, 4, 16, 16)),  # more than there are blocks
        (torch.bfloat16, 1, (4, 4, 16, 16)),
        (torch.bfloat16, 7, (4, 2, 8, 4)),  # maxima and candidates in several tiles
        (torch.float16, 7, (2, 8, 32, 16)),
    ],
)
def test_heads_of_misleading_rows(monkeypatch, dtype, top_k, tiles):
    set_tiles(monkeypatch, dict(zip(TILES, tiles, strict=True)))
    logits = misleading_rows(37).clamp(max=1e4 if dtype == torch.float16 else 1e30)
    logits = logits.where(logits.isinf(), logits.clamp(min=-1e4 if dtype == torch.float16 else -1e30)).to(
        dtype
    )
    targets = torch.arange(len(logits))
    on_device, targets_there = logits.to(DEVICE), targets.to(DEVICE)
    sums, maxima = fused._sum_rows(on_device, targets_there, None, wants_maxima=True)
    head = fused._select_head(on_device, targets_there, sums, maxima, top_k, None)
    is_head = head_by_sorting(logits, top_k)
    assert torch.equal(logits.float() >= head["threshold"].cpu()[:, None], is_head)
    assert head["size"].tolist() == is_head.sum(1).tolist()
    shifted = logits.double() - logits.double().amax(1, keepdim=True)
    masses = shifted.exp().masked_fill(~is_head, 0).scatter(1, targets[:, None], 0)
    torch.testing.assert_close(head["mass"].double().cpu(), masses.sum(1), rtol=1e-6, atol=0)
    weighted = (masses * shifted.clamp(min=-1e4)).sum(1)
    torch.testing.assert_close(head["weighted"].double().cpu(), weighted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("objective_", SETTINGS, ids=lambda settings: settings.name)
def test_adversarial_rows_match_float64(bench, objective_):
    logits = misleading_rows(37)[[1, 2, 4, 7, 8]]
    # At the threshold of a tie, in it, at the end of the head, next to -inf, and the largest.
    targets = torch.tensor([int(logits[0].topk(5).indices[-1]), 36, 4, 1, int(logits[4].argmax())])
    loss, gradient, metrics = evaluate(logits, targets, objective_)
    expected_loss, expected_gradient, expected_metrics = evaluate_exactly(logits, targets, objective_)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    assert (gradient[logits == -torch.inf] == 0).all()
    for actual, expected in zip(metrics, expected_metrics, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_margins_keep_relative_precision():
    margins = torch.tensor([-110.0, -90, -5, 0, 5, 20, 80])
    logits = torch.zeros(len(margins), 7)
    logits[:, 3] = margins
    targets = torch.full((len(margins),), 3)
    objective_ = RewardShaping(beta=-0.25)
    loss, gradient, _ = evaluate(logits, targets, objective_, wants_metrics=False)
    expected_loss, expected_gradient, _ = evaluate_exactly(logits, targets, objective_)
    # The exponential of -110 is good to 110 roundings; what is below the smallest normal number may be 0.
    torch.testing.assert_close(loss, expected_loss, rtol=2e-5, atol=1e-37)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-5, atol=1e-37)


def test_an_excluded_logit_stays_excluded_under_a_softcap():
    logits = torch.tensor([[1.0, -torch.inf, 0.5, 0.0]])
    kept = torch.tensor([[1.0, 0.5, 0.0]])
    options = {"logit_softcap": 2.0, "z_loss": 0.1}
    objective_ = RewardShaping(beta=-0.25, tail_reward=-0.1, top_k=1)
    loss, gradient, metrics = evaluate(logits, torch.tensor([2]), objective_, **options)
    kept_loss, kept_gradient, kept_metrics = evaluate(kept, torch.tensor([1]), objective_, **options)
    torch.testing.assert_close(loss, kept_loss, rtol=1e-6, atol=0)
    assert gradient[0, 1] == 0
    torch.testing.assert_close(gradient[:, [0, 2, 3]], kept_gradient, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(metrics, kept_metrics, rtol=1e-6, atol=1e-7)


@pytest.fixture
def rounding_like_a_gpu(monkeypatch):
    """The interpreter cuts a float32 off at the bits of bfloat16, where GPUs round it."""
    convert = interpreter._convert_float

    def round_and_convert(values, source, result, mode):
        if result == triton.language.bfloat16:
            values = torch.tensor(values).bfloat16().float().numpy()
        return convert(values, source, result, mode)

    monkeypatch.setattr(interpreter, "_convert_float", round_and_convert)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective_", SETTINGS, ids=lambda settings: settings.name)
def test_low_precision_is_no_worse_than_plain_cross_entropy(bench, rounding_like_a_gpu, dtype, objective_):
    inputs = bench.make_inputs(seed=5, n=24, v=61, d=16, scale=0.5).to(dtype)
    assert_within_budget(inputs, objective_)


def test_float16_gradients_are_scaled_after_the_products(bench):
    # 2^-20 times a probability of some hundredths is below the smallest float16.
    inputs = small_inputs(bench, scale=0.3)
    expected = bench.oracle(CrossEntropy(), inputs, "mean", 2.0**-20)
    with torch.autocast(DEVICE, dtype=torch.float16):
        actual = compute(bench, CrossEntropy(), inputs, "mean", 2.0**-20)
    assert actual.weight_gradient.dtype == torch.float32
    # Logits up to 10 in float16 are off by up to 0.004.
    bench.assert_agree(actual, expected, 0.01)


def test_views_chunks_and_frozen_inputs(bench):
    inputs = small_inputs(bench)
    both = compute(bench, SHAPING, inputs, "mean")
    for wants_hidden, wants_weight in ((True, False), (False, True)):
        hidden = inputs.hidden.T.contiguous().to(DEVICE).T.requires_grad_(wants_hidden)
        wide = torch.zeros(37, 10, device=DEVICE)
        wide[:, ::2] = inputs.weight.to(DEVICE)
        weight = wide[:, ::2].requires_grad_(wants_weight)
        assert not hidden.is_contiguous()
        assert not weight.is_contiguous()
        linear_shaped_cross_entropy(
            hidden,
            weight,
            inputs.targets.to(DEVICE),
            SHAPING,
            inputs.token_weights.to(DEVICE),
            implementation="triton",
            chunk_rows=2,
        ).backward()
        if wants_hidden:
            bench.assert_close(hidden.grad.cpu(), both.hidden_gradient, 1e-6, "gradient of hidden")
            assert weight.grad is None
        else:
            bench.assert_close(weight.grad.cpu(), both.weight_gradient, 1e-6, "gradient of weight")
            assert hidden.grad is None


@pytest.fixture
def poisoned_memory():
    """Fresh buffers hold nan, or the largest integer; not on a GPU, whose products are refused in this mode."""
    if DEVICE == "cpu":
        torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_nothing_leaks_from_ignored_rows_or_fresh_buffers(bench, poisoned_memory, reduction):
    inputs = small_inputs(bench)
    assert inputs.targets.tolist().count(-100) == 1
    if DEVICE == "cpu":
        assert torch.empty(3).isnan().all()
    inputs.hidden[inputs.targets == -100] = torch.nan
    outcome = compute(bench, SHAPING, inputs, reduction)
    assert (outcome.hidden_gradient[inputs.targets == -100] == 0).all()
    inputs.hidden[inputs.targets == -100] = 0
    bench.assert_agree(outcome, bench.oracle(SHAPING, inputs, reduction, 1.0), TOLERANCE)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about nan, in the interpreter
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_broken_row_is_nan_and_stays_alone(poison):
    logits = misleading_rows(37)[[0, 0, 4]]
    targets = torch.tensor([3, 3, 0])
    whole = evaluate(logits, targets, SHAPING)
    logits[1, 20] = poison
    loss, gradient, _ = evaluate(logits, targets, SHAPING)
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(loss[::2], whole[0][::2])
    assert torch.equal(gradient[::2], whole[1][::2])


@pytest.mark.parametrize("n", [0, 2])
def test_nothing_to_learn_from_is_zero(bench, n):
    inputs = small_inputs(bench)
    inputs = bench.inputs(inputs.hidden[:n], inputs.weight, inputs.targets[:n], inputs.token_weights[:n])
    inputs.targets.fill_(-100)
    outcome = compute(bench, SHAPING, inputs, "mean")
    assert outcome.loss == 0
    assert (outcome.hidden_gradient == 0).all()
    assert (outcome.weight_gradient == 0).all()


@pytest.mark.parametrize("columns", [1, 2])
def test_one_position_and_the_smallest_vocabularies(columns):
    logits, targets = torch.tensor([[0.5, -1.0]])[:, :columns], torch.tensor([0])
    objective_ = RewardShaping(beta=0.5, head_reward=0.1, tail_reward=-0.1, top_k=1)
    loss, gradient, _ = evaluate(logits, targets, objective_)
    expected_loss, expected_gradient, _ = evaluate_exactly(logits, targets, objective_)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_where_there_is_none(tmp_path):
    """What the interpreter lets pass, the compiler may refuse."""
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rlprior.objectives import kernels

SIZES = {"NUM_COLUMNS": 50257, "NUM_BLOCKS": 1571, "BLOCKS": 128, "COLUMNS": 32, "MAXIMA": 1024}
SHIFTS = {"fp32": 0, "bf16": 16, "fp16": 13}
TYPES = {"targets_ptr": "*i64", "selected_ptr": "*i32", "num_selected_ptr": "*i32", "lowest_key_ptr": "*i32",
         "top_k": "i32", "softcap": "fp32"}
for dtype, shift in SHIFTS.items():
    for kernel in (kernels.sum_rows, kernels.select_blocks, kernels.select_head, kernels.write_gradient):
        # Every option in one dtype, none in the others.
        options = {name: dtype == "bf16" for name in kernel.arg_names if name.startswith("HAS_")}
        given = {**SIZES, "SHIFT": shift, **options}
        constants = {name: given[name] for name in kernel.arg_names if name.isupper()}
        logits = {"logits_ptr": "*" + dtype, "maxima_ptr": "*" + dtype}
        types = {name: {**TYPES, **logits}.get(name, "*fp32") for name in kernel.arg_names}
        signature = {name: "constexpr" if name in constants else types[name] for name in types}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert ".entry" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print("compiled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert result.stdout == "compiled\n", result.stderr


def find(implementation="triton", objective_=SHAPING, dtype=torch.float32, device=DEVICE):
    return registry.find_kernels(implementation, objective_, dtype, torch.device(device))


def test_only_triton_by_name_takes_the_kernels():
    assert find() is fused.evaluate_rows_
    assert find(dtype=torch.bfloat16) is fused.evaluate_rows_
    assert find("auto", device="cuda") is None
    assert find("chunked", device="cuda") is None


def test_triton_by_name_says_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match=r"needs logits in float32, bfloat16 or float16, got torch\.float64"):
        find(dtype=torch.float64)
    monkeypatch.setattr(fused, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        find(device="cpu")
    monkeypatch.delattr(rlprior.objectives, "fused")
    monkeypatch.setitem(sys.modules, "rlprior.objectives.fused", None)  # as if it could not be imported
    with pytest.raises(ValueError, match=r"needs the triton package \(pip install 'rlprior\[gpu\]'\)"):
        find()
