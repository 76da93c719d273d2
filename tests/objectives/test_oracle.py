"""Every registered objective on every path against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from rlprior.objectives import (
    CrossEntropy,
    DynamicFineTuning,
    Focal,
    LabelSmoothing,
    RewardShaping,
    shaped_cross_entropy,
)


def test_float64_matches_the_oracle(bench, objective, path):
    bench.check(path, objective, bench.make_inputs())


def test_float32_matches_the_oracle(bench, objective, path):
    # The logits of float32 inputs carry errors of about 1e-6, which rewards of up to 30 and 1/p amplify.
    inputs = bench.make_inputs(scale=0.7).to(torch.float32)
    bench.check(path, objective, inputs, tolerance=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"logit_softcap": 3.0}, {"z_loss": 0.01}, {"logit_softcap": 30.0, "z_loss": 1.0}],
    ids=lambda options: " and ".join(options),
)
def test_options_compose_with_every_objective(bench, objective, path, options):
    bench.check(path, objective, bench.make_inputs(seed=2), **options)


def test_excluded_logits_stay_excluded_under_a_softcap():
    # tanh(-inf) is -1: a padded column would come back with a logit of -c.
    logits = torch.tensor([[1.0, -torch.inf, 0.5]], dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([[1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    shaping = RewardShaping(beta=-0.25, tail_reward=-0.1, top_k=1)
    for inputs, target in ((logits, 2), (kept, 1)):
        shaped_cross_entropy(
            inputs, torch.tensor([target]), shaping, logit_softcap=2.0, z_loss=0.1
        ).backward()
    first, last = kept.grad.tolist()[0]
    assert logits.grad.tolist()[0] == pytest.approx([first, 0, last], rel=1e-14)


def test_gradient_rows_sum_to_zero(bench, objective):
    # Softmax ignores a constant added to a row, so the gradient has no component along it.
    inputs = bench.make_inputs()
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        logits = inputs.logits.to(dtype).requires_grad_()
        shaped_cross_entropy(logits, inputs.targets, objective, reduction="sum").backward()
        sums = logits.grad.sum(1).abs()
        assert (sums <= tolerance * logits.grad.abs().sum(1).clamp_min(1)).all()


@pytest.mark.parametrize(
    ("objective_", "smoothing"),
    [
        (CrossEntropy(), 0.0),
        (RewardShaping(), 0.0),
        (RewardShaping(top_k=3), 0.0),
        (LabelSmoothing(smoothing=0.0), 0.0),
        (Focal(gamma=0.0), 0.0),
        (LabelSmoothing(smoothing=0.1), 0.1),
        (LabelSmoothing(smoothing=0.9), 0.9),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduces_to_torch(bench, path, objective_, smoothing, reduction):
    inputs = bench.make_inputs(seed=3)
    inputs.token_weights.fill_(1)
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    loss = functional.cross_entropy(
        hidden @ weight.T, inputs.targets, reduction=reduction, label_smoothing=smoothing
    )
    loss.sum().backward()
    actual = bench.compute(path, objective_, inputs, reduction)
    bench.assert_close(actual.loss, loss.detach(), 1e-13, "loss")
    bench.assert_close(actual.hidden_gradient, hidden.grad, 1e-12, "gradient of hidden")
    bench.assert_close(actual.weight_gradient, weight.grad, 1e-12, "gradient of weight")


def test_two_tokens_by_hand():
    # p = (4/5, 1/5), target 0: q = 1/5.
    logits = torch.tensor([[math.log(4), 0.0]], dtype=torch.float64, requires_grad=True)
    weight = 0.8 ** (1 - 0.2**-0.25)  # 1.1168
    # Token 1 alone is the tail of k = 1. C = w - 0.1 * 0.2; dL/dz_1 = p_1 (C + 0.1) and dL/dz_0 is its negative.
    by_hand = {
        RewardShaping(): (-math.log(0.8), 0.2),
        RewardShaping(beta=-0.25): (-weight * math.log(0.8), 0.2 * weight),
        RewardShaping(tail_reward=-0.1, top_k=1): (
            -math.log(0.8) + 0.1 * 0.2 * math.log(0.2),
            0.2 * (1 - 0.02 + 0.1),
        ),
        RewardShaping(head_reward=0.1, top_k=2): (
            -math.log(0.8) - 0.1 * 0.2 * math.log(0.2),
            0.2 * (1 + 0.02 - 0.1),
        ),
        LabelSmoothing(smoothing=0.5): (-0.75 * math.log(0.8) - 0.25 * math.log(0.2), -0.05),
        Focal(gamma=2.0): (-0.04 * math.log(0.8), 0.2 * (0.04 - 0.4 * 0.8 * math.log(0.8))),
        DynamicFineTuning(): (-0.8 * math.log(0.8), 0.8 * 0.2),
    }
    for objective_, (loss_by_hand, gradient_by_hand) in by_hand.items():
        logits.grad = None
        loss = shaped_cross_entropy(logits, torch.tensor([0]), objective_)
        loss.backward()
        assert loss.item() == pytest.approx(loss_by_hand, rel=1e-14), objective_
        assert logits.grad.tolist()[0] == pytest.approx([-gradient_by_hand, gradient_by_hand], rel=1e-14), (
            objective_
        )
