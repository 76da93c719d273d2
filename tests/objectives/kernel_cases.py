"""What the tests of the Triton kernels share: compiled where there is a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from rlprior.objectives import (
    CrossEntropy,
    LabelSmoothing,
    RewardShaping,
    fused,
    linear,
    linear_shaped_cross_entropy,
    shaped_cross_entropy,
)
from rlprior.objectives.batch import TokenBatch
from rlprior.objectives.closed_form import Scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPING = RewardShaping(beta=-0.25, head_reward=0.3, tail_reward=-0.2, top_k=5)
SETTINGS = (CrossEntropy(), SHAPING, LabelSmoothing(smoothing=0.1))

# Float32 logits of up to 20 are off by 1e-6 and probabilities by as much of themselves; sums of some dozen add to it.
TOLERANCE = 1e-5

TILES = ("BLOCK_COLUMNS", "PASS_BLOCKS", "SEARCH_MAXIMA", "SEARCH_BLOCKS")
DEFAULT_TILES = {name: getattr(fused, name) for name in TILES}


def set_tiles(patch, sizes):
    for name, size in sizes.items():
        patch.setattr(fused, name, size)


def set_small_tiles(patch):
    """Rows of 37 columns then have ten blocks, the last with one column, in three tiles."""
    set_tiles(patch, dict(zip(TILES, (4, 4, 16, 16), strict=True)))


def compute(bench, objective, inputs, reduction, upstream=1.0, **options):
    """Outcome of the kernels on `DEVICE`, brought back."""
    moved = bench.inputs(*(getattr(inputs, field.name).to(DEVICE) for field in dataclasses.fields(inputs)))
    if isinstance(upstream, torch.Tensor):
        upstream = upstream.to(DEVICE)
    outcome = bench.compute("triton", objective, moved, reduction, upstream, **options)
    return dataclasses.replace(
        outcome,
        loss=outcome.loss.cpu(),
        hidden_gradient=outcome.hidden_gradient.cpu(),
        weight_gradient=outcome.weight_gradient.cpu(),
    )


def check(bench, objective, inputs, tolerance=TOLERANCE, reductions=("sum",), **options):
    """The kernels against the oracle, with upstream gradients other than 1."""
    upstream_N = torch.linspace(-2, 3, len(inputs.targets), dtype=torch.float64)
    for reduction in reductions:
        upstream = {"none": upstream_N, "sum": 1.7, "mean": -0.3}[reduction]
        expected = bench.oracle(objective, inputs, reduction, upstream, **options)
        bench.assert_agree(
            compute(bench, objective, inputs, reduction, upstream, **options), expected, tolerance
        )


def small_inputs(bench, dtype=torch.float32, **changes):
    return bench.make_inputs(**{"seed": 1, "n": 4, "scale": 0.7, **changes}).to(dtype)


def evaluate(logits, targets, objective, wants_metrics=True, **options):
    """Loss, gradient and metrics of rows of given logits, in float64."""
    options = {"logit_softcap": None, "z_loss": 0.0, **options}
    plan = linear._plan(objective, None, wants_metrics, **options)
    batch = TokenBatch(targets.to(DEVICE), None, None, None)
    gradient = logits.clone().to(DEVICE)
    ones = torch.ones(len(logits), device=DEVICE)
    result = fused.evaluate_rows_(gradient, batch, plan, Scratch(), ones)
    metrics = [] if result.metrics is None else [metric.double().cpu() for metric in result.metrics.tensors()]
    return result.loss.double().cpu(), gradient.double().cpu(), metrics


def evaluate_exactly(logits, targets, objective):
    """The same by the generic code in float64."""
    leaf = logits.double().requires_grad_()
    loss, metrics = shaped_cross_entropy(leaf, targets, objective, reduction="none", return_metrics=True)
    loss.sum().backward()
    return loss.detach(), leaf.grad, list(metrics.tensors())


def misleading_rows(columns):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(columns, generator=generator)
    ramp = torch.arange(columns, dtype=torch.float32)
    return torch.stack(
        [
            normal,
            normal.round(),  # ties in every block
            torch.zeros(columns),
            torch.where(ramp % 2 == 0, 0.0, -0.0),
            -ramp,  # the head in one corner of the columns
            ramp,
            1 + ramp * 2**-23,  # neighbouring floats
            torch.where(ramp % 3 == 0, -torch.inf, normal),
            torch.where(ramp < 20, -torch.inf, normal - 1000),  # nothing finite in the first tile
            torch.where(ramp == 5, 1.0, -torch.inf),
            torch.where(ramp == 3, 1e30, -1e30),
        ]
    )


LOSS_SCALE = 1024.0  # as in mixed-precision training: without it, float16 gradients of a mean are subnormal


def relative_error(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


def assert_within_budget(inputs, objective_):
    """Budget: the errors of `F.cross_entropy(F.linear(...))` in the same dtype, against float64 on the same numbers."""
    tensors = [tensor.to(DEVICE) for tensor in (inputs.hidden, inputs.weight, inputs.targets)]
    hidden, weight, targets = tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2]
    logits = functional.linear(hidden, weight)

    def exact(settings):
        leaf = logits.detach().double().requires_grad_()
        loss = shaped_cross_entropy(leaf, targets, settings)
        loss.backward(torch.tensor(LOSS_SCALE, dtype=torch.float64, device=DEVICE))
        return loss.detach(), leaf.grad @ weight.detach().double(), leaf.grad.T @ hidden.detach().double()

    def errors(loss, settings):
        gradients = torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, LOSS_SCALE))
        assert gradients[0].dtype == gradients[1].dtype == inputs.hidden.dtype
        pairs = zip((loss.detach(), *gradients), exact(settings), strict=True)
        return [relative_error(actual, expected) for actual, expected in pairs]

    budget = errors(functional.cross_entropy(logits, targets), CrossEntropy())
    loss = linear_shaped_cross_entropy(hidden, weight, targets, objective_, implementation="triton")
    assert loss.dtype == torch.float32
    for error, allowed in zip(errors(loss, objective_), budget, strict=True):
        assert error <= allowed
