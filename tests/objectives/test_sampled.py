"""The sampled estimator: its expectation over all draws is the exact gradient, and its draws are reproducible."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from rlprior.objectives import (
    RewardShaping,
    SampledReward,
    formulas,
    linear_shaped_cross_entropy,
    shaped_cross_entropy,
)
from rlprior.objectives import inputs as inputs_module

SETTINGS = (
    {"beta": -0.25, "head_reward": 0.0, "tail_reward": 0.0, "top_k": 3},
    {"beta": 0.5, "head_reward": 0.3, "tail_reward": -0.4, "top_k": 3},
    {"beta": 0.0, "head_reward": 0.2, "tail_reward": 0.2, "top_k": 1},
)


def estimate(bench, monkeypatch, path, sampled, inputs, draws):
    """Outcome of one row for these drawn tokens, each reached by a number in the middle of its share of [0, 1)."""
    cumulative = inputs.logits[0].softmax(0).cumsum(0)
    shares = torch.cat([torch.zeros(1, dtype=torch.float64), cumulative])
    uniforms = torch.tensor([[float(shares[a] + shares[a + 1]) / 2 for a in draws]], dtype=torch.float64)
    monkeypatch.setattr(inputs_module, "draw_uniforms", lambda objective, targets, generator: uniforms)
    return bench.compute(path, sampled, inputs, "sum")


@pytest.mark.parametrize("shaping", SETTINGS, ids=str)
@pytest.mark.parametrize("num_samples", [1, 2])
def test_expectation_over_every_draw_is_the_exact_gradient(bench, monkeypatch, path, shaping, num_samples):
    inputs = bench.make_inputs(seed=4, n=1, v=7)
    probabilities = inputs.logits[0].softmax(0).tolist()
    sampled = SampledReward(**shaping, num_samples=num_samples)
    hidden_gradient, weight_gradient, loss = torch.zeros(1, 5), torch.zeros(7, 5), 0.0
    for draws in itertools.product(range(7), repeat=num_samples):
        outcome = estimate(bench, monkeypatch, path, sampled, inputs, draws)
        probability = torch.tensor([probabilities[a] for a in draws], dtype=torch.float64).prod()
        hidden_gradient = hidden_gradient + probability * outcome.hidden_gradient
        weight_gradient = weight_gradient + probability * outcome.weight_gradient
        loss = loss + probability * outcome.loss
    monkeypatch.undo()
    exact = bench.compute(path, RewardShaping(**shaping), inputs, "sum")
    bench.assert_close(hidden_gradient, exact.hidden_gradient, 1e-13, "expected gradient of hidden")
    bench.assert_close(weight_gradient, exact.weight_gradient, 1e-13, "expected gradient of weight")
    # The surrogate's value agrees as well: -sum_a p_a r_a log p_a.
    bench.assert_close(torch.as_tensor(loss), exact.loss, 1e-13, "expected loss")


def test_average_over_many_draws_approaches_the_exact_gradient():
    shaping = {"beta": 0.5, "head_reward": 0.3, "tail_reward": -0.4, "top_k": 2}
    logits = torch.tensor([[1.0, 0.5, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1])
    (exact,) = torch.autograd.grad(shaped_cross_entropy(logits, target, RewardShaping(**shaping)), logits)
    num_samples = 200_000
    sampled = SampledReward(**shaping, num_samples=num_samples, seed=3)
    (estimated,) = torch.autograd.grad(shaped_cross_entropy(logits, target, sampled), logits)
    # Rewards are at most 1/p_x = 3.6, so a draw's gradient has a standard deviation below 3.6; five of the mean's.
    assert (estimated - exact).abs().max() < 5 * 3.6 / num_samples**0.5
    assert not torch.equal(estimated, exact)


def test_seed_and_generator_decide_the_draws(bench, path):
    inputs = bench.make_inputs()
    sampled = SampledReward(head_reward=0.5, tail_reward=-0.5, top_k=3, seed=7)

    def loss(objective=sampled, generator=None):
        if path == "logits":
            return shaped_cross_entropy(inputs.logits, inputs.targets, objective, generator=generator)
        return linear_shaped_cross_entropy(
            inputs.hidden, inputs.weight, inputs.targets, objective, generator=generator, implementation=path
        )

    torch.manual_seed(0)
    first = loss()
    torch.manual_seed(1)
    assert torch.equal(loss(), first)  # not from the global generator
    assert torch.equal(loss(generator=torch.Generator().manual_seed(7)), first)
    assert not torch.equal(loss(dataclasses.replace(sampled, seed=8)), first)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(loss(generator=generator), first)
    assert not torch.equal(loss(generator=generator), first)  # it has moved on


def test_ignoring_a_position_changes_no_other_draw(bench, path):
    inputs = bench.make_inputs()
    sampled = SampledReward(head_reward=0.5, tail_reward=-0.5, top_k=3, num_samples=2)
    before = bench.compute(path, sampled, inputs, "none")
    inputs.targets[0] = -100
    after = bench.compute(path, sampled, inputs, "none")
    bench.assert_close(after.loss[1:], before.loss[1:], 1e-14, "loss")


def test_paths_draw_the_same_tokens(bench):
    sampled = SampledReward(beta=0.5, head_reward=0.5, tail_reward=-0.5, top_k=3, num_samples=5)
    inputs = bench.make_inputs(n=200)
    first, *others = (bench.compute(path, sampled, inputs, "none") for path in bench.paths)
    for other in others:
        bench.assert_agree(other, first, 1e-12)


def test_no_uniform_number_draws_past_the_last_mass():
    """(1 - 2^-53) times a total is below the total after rounding, whatever the total is."""
    generator = torch.Generator().manual_seed(0)
    masses = torch.rand(10_000, 5, generator=generator, dtype=torch.float64)
    masses[::2] = masses[::2].float().double()
    masses[:, 3:] = 0
    masses[:40, 0] = 1 + torch.arange(40) * 2**-52  # totals next to a power of two
    masses[:40, 1:] = 0
    largest = torch.full((len(masses), 1), 1 - 2**-53, dtype=torch.float64)
    drawn = formulas.draw_tokens(masses, largest)
    assert (masses.gather(1, drawn) > 0).all()


def test_the_largest_uniform_number_draws_a_possible_token():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    generator = torch.Generator()
    with pytest.MonkeyPatch.context() as patch:
        largest = torch.full((1, 1), 1 - 2**-53, dtype=torch.float64)
        patch.setattr(inputs_module, "draw_uniforms", lambda *_: largest)
        loss = shaped_cross_entropy(
            logits, torch.tensor([1]), SampledReward(head_reward=1.0), generator=generator
        )
    # The target itself: reward 1/p, loss -log(p)/p.
    p = float(logits.softmax(1)[0, 1])
    assert loss.item() == pytest.approx(-torch.tensor(p).log().item() / p, rel=1e-6)
