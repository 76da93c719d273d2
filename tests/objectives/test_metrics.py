"""Metrics against their definitions, token by token."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from rlprior.objectives import (
    METRICS_TOP_K,
    CrossEntropy,
    Focal,
    LabelSmoothing,
    RewardShaping,
    linear_shaped_cross_entropy,
    shaped_cross_entropy,
)


def metrics_by_definition(logits: list[float], target: int, top_k: int) -> dict[str, float]:
    top = max(logits)
    masses = [math.exp(z - top) for z in logits]
    p = [mass / math.fsum(masses) for mass in masses]
    last = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
    head = [j for j, z in enumerate(logits) if z >= last]
    return {
        "cross_entropy": -math.log(p[target]),
        "entropy": -math.fsum(x * math.log(x) for x in p if x > 0),
        "head_mass": math.fsum(p[j] for j in head),
        "head_size": len(head),
        "target_rank": 1 + sum(z > logits[target] for z in logits),
        "top_prob": max(p),
    }


def test_metrics_follow_their_definitions(bench, objective, path):
    inputs = bench.make_inputs()
    top_k = getattr(objective, "top_k", METRICS_TOP_K)
    metrics = bench.compute(path, objective, inputs, "sum").metrics
    for index, target in enumerate(inputs.targets.tolist()):
        actual = {
            field.name: getattr(metrics, field.name)[index].item() for field in dataclasses.fields(metrics)
        }
        if target == -100:
            assert all(math.isnan(value) for value in actual.values())
        else:
            expected = metrics_by_definition(inputs.logits[index].tolist(), target, top_k)
            assert actual == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_metrics_do_not_depend_on_the_objective(bench, path):
    inputs = bench.make_inputs()
    settings = (
        RewardShaping(beta=0.5, head_reward=0.3, tail_reward=-0.2, top_k=4),
        RewardShaping(beta=-0.25, top_k=4),
        RewardShaping(head_reward=0.2, tail_reward=0.2, top_k=4),
    )
    first, *others = (bench.compute(path, shaping, inputs, "sum").metrics for shaping in settings)
    for other in others:
        for actual, expected in zip(other.tensors(), first.tensors(), strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-13, atol=1e-14)


def test_asking_for_metrics_changes_neither_loss_nor_gradient(bench, objective):
    inputs = bench.make_inputs()
    gradients, losses = [], []
    for return_metrics in (False, True):
        hidden = inputs.hidden.clone().requires_grad_()
        result = linear_shaped_cross_entropy(
            hidden, inputs.weight, inputs.targets, objective, return_metrics=return_metrics
        )
        loss = result[0] if return_metrics else result
        loss.backward()
        losses.append(loss.detach())
        gradients.append(hidden.grad)
    bench.assert_close(losses[1], losses[0], 1e-13, "loss")
    bench.assert_close(gradients[1], gradients[0], 1e-13, "gradient")


@pytest.mark.parametrize("top_k", [1, 3, 37, 1000])
def test_metrics_top_k_is_for_objectives_without_one(bench, path, top_k):
    inputs = bench.make_inputs()
    options = {"return_metrics": True, "metrics_top_k": top_k}

    def measure(objective):
        if path == "logits":
            return shaped_cross_entropy(inputs.logits, inputs.targets, objective, **options)[1]
        return linear_shaped_cross_entropy(
            inputs.hidden, inputs.weight, inputs.targets, objective, implementation=path, **options
        )[1]

    for objective in (CrossEntropy(), Focal(), LabelSmoothing()):
        sizes = measure(objective).head_size
        assert sizes[inputs.targets != -100].tolist() == [min(top_k, 37)] * int(
            (inputs.targets != -100).sum()
        )
    measure(RewardShaping(top_k=top_k))
    with pytest.raises(ValueError, match="metrics_top_k must be None or the objective's own 2"):
        measure(RewardShaping(top_k=2))


@pytest.mark.parametrize("top_k", [0, -1])
def test_metrics_top_k_must_be_positive(top_k):
    with pytest.raises(ValueError, match="metrics_top_k"):
        shaped_cross_entropy(
            torch.zeros(1, 3), torch.tensor([0]), CrossEntropy(), return_metrics=True, metrics_top_k=top_k
        )


def test_metrics_are_detached_and_shaped_like_the_targets(bench, path):
    hidden = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.tensor([[0, 1, -100], [3, 4, 5]])
    if path == "logits":
        loss, metrics = shaped_cross_entropy(hidden @ weight.T, targets, RewardShaping(), return_metrics=True)
    else:
        loss, metrics = linear_shaped_cross_entropy(
            hidden, weight, targets, RewardShaping(), implementation=path, return_metrics=True
        )
    loss.backward()
    for tensor in metrics.tensors():
        assert tensor.shape == targets.shape
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert tensor.isnan().tolist() == (targets == -100).tolist()


def test_float32_metrics_in_a_large_vocabulary(bench, path):
    # Above the size at which the head is selected in two levels. Sums of 9000 float32 terms are good to five digits.
    inputs = bench.make_inputs(n=6, v=9001)
    exact = bench.compute(path, CrossEntropy(), inputs, "sum").metrics
    metrics = bench.compute(path, CrossEntropy(), inputs.to(torch.float32), "sum").metrics
    for actual, expected in zip(metrics.tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_certainty_has_no_entropy_and_all_its_mass_in_the_head(path, bench):
    inputs = bench.inputs(
        torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([0]), torch.ones(1)
    )
    metrics = bench.compute(path, RewardShaping(top_k=1), inputs, "sum").metrics
    assert [tensor.item() for tensor in metrics.tensors()] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
