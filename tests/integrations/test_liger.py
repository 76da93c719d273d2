"""Liger's calls, against torch's cross-entropy on full logits: Liger itself needs a GPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rlprior.integrations.liger import FusedLinearShapedCrossEntropyLoss, fused_linear_shaped_cross_entropy
from rlprior.objectives import LabelSmoothing, Objective, RewardShaping, SampledReward


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(17, (11,), generator=generator)
    target[2] = -100
    return hidden, weight, target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shaping", [RewardShaping(), LabelSmoothing(smoothing=0.2)])
def test_equals_cross_entropy(reduction: Any, shaping: Objective):
    hidden, weight, target = tensors()
    upstream = (
        torch.linspace(1, 2, 11, dtype=torch.float64) if reduction == "none" else torch.tensor(3.0).double()
    )
    smoothing = shaping.smoothing if isinstance(shaping, LabelSmoothing) else 0.0
    expected = F.cross_entropy(hidden @ weight.T, target, reduction=reduction, label_smoothing=smoothing)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight), upstream)
    found = FusedLinearShapedCrossEntropyLoss(shaping, reduction=reduction)(weight, hidden, target)
    torch.testing.assert_close(found, expected)  # float64
    torch.testing.assert_close(torch.autograd.grad(found, (hidden, weight), upstream), expected_gradients)


def test_liger_s_options_mean_what_they_mean_there():
    hidden, weight, target = tensors()
    target[target == -100] = 16
    logits = 2.0 * torch.tanh(hidden @ weight.T / 2.0)
    kept = target != 16
    expected = (F.cross_entropy(logits, target, reduction="none") + 0.1 * logits.logsumexp(-1) ** 2)[
        kept
    ].mean()
    found = fused_linear_shaped_cross_entropy(
        hidden, weight, target, RewardShaping(), ignore_index=16, lse_square_scale=0.1, softcap=2.0
    )
    torch.testing.assert_close(found, expected)


def test_arguments_stand_where_liger_has_them():
    """As in LigerFusedLinearCrossEntropyLoss.forward and liger_fused_linear_cross_entropy of liger-kernel 0.8."""
    forward = inspect.signature(FusedLinearShapedCrossEntropyLoss.forward)
    assert list(forward.parameters) == ["self", "lin_weight", "_input", "target", "bias"]
    function = [
        name for name in inspect.signature(fused_linear_shaped_cross_entropy).parameters if name != "shaping"
    ]
    assert function[:4] == ["input", "weight", "target", "bias"]


def test_what_it_does_not_support_is_refused():
    hidden, weight, target = tensors()
    loss = FusedLinearShapedCrossEntropyLoss(RewardShaping())
    with pytest.raises(ValueError, match="bias must be None"):
        loss(weight, hidden, target, weight[:, 0])
    with pytest.raises(TypeError, match="label_smoothing"):
        FusedLinearShapedCrossEntropyLoss(RewardShaping(), label_smoothing=0.1)  # pyright: ignore[reportCallIssue]


def test_draws_go_on_from_call_to_call():
    hidden, weight, target = tensors()
    shaping = SampledReward(beta=-0.25, head_reward=0.5, tail_reward=-0.5)
    loss, again = FusedLinearShapedCrossEntropyLoss(shaping), FusedLinearShapedCrossEntropyLoss(shaping)
    losses = [loss(weight, hidden, target).item() for _ in range(2)]
    assert losses == [again(weight, hidden, target).item() for _ in range(2)]
    assert losses[0] != losses[1]
