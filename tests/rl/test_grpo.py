"""Advantages and the clipped loss against hand computations and the textbook formula; the settings of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlprior.rl.config import LengthPhase, RLConfig, RolloutConfig
from rlprior.rl.grpo import (
    aggregation_weights,
    clipped_policy_loss,
    group_advantages,
    has_signal,
    truncated_importance,
)
from rlprior.seeding import torch_generator
from rlprior.tasks.config import TaskConfig
from rlprior.training.engine import EngineConfig

# P prompts (groups), G samples a group, N response tokens of the whole batch

REWARDS = st.sampled_from([0.0, 1.0]) | st.floats(-3, 3, width=32)
GROUPS = st.integers(2, 8).flatmap(
    lambda size: st.lists(st.lists(REWARDS, min_size=size, max_size=size), min_size=1, max_size=4)
)


# advantages


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [3.0, 1.0, 1.0, -1.0]])
    # sample deviations: squares sum to 0.75, 1 and 8, each divided by 3
    deviations = [math.sqrt(0.25), math.sqrt(1 / 3), math.sqrt(8 / 3)]
    expected = torch.tensor(
        [
            [0.75, -0.25, -0.25, -0.25],
            [0.5, 0.5, -0.5, -0.5],
            [2.0, 0.0, 0.0, -2.0],
        ]
    ) / (torch.tensor(deviations)[:, None] + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), expected)


@given(GROUPS)
def test_advantages_are_zero_on_average_and_ordered_as_the_rewards(rows: list[list[float]]) -> None:
    rewards = torch.tensor(rows)
    advantages = group_advantages(rewards)
    assert advantages.isfinite().all()
    # rewards of 3 have float32 steps of 2e-7, which the divisor of at least 1e-4 enlarges, once for each of 8 samples
    torch.testing.assert_close(advantages.sum(1), torch.zeros(len(rows)), atol=0.02, rtol=0)
    for row_rewards, row_advantages in zip(rewards, advantages, strict=True):
        order = row_rewards.argsort()
        assert (row_advantages[order].diff() >= 0).all()
    assert not advantages[~has_signal(rewards)].any()


@given(REWARDS, st.integers(2, 16))
def test_equal_rewards_give_exactly_no_advantage(reward: float, size: int) -> None:
    rewards = torch.full((1, size), reward)
    assert group_advantages(rewards).tolist() == [[0.0] * size]
    assert has_signal(rewards).tolist() == [False]


def test_groups_do_not_look_at_each_other() -> None:
    rewards = torch.rand(3, 5, generator=torch_generator(0))
    together = group_advantages(rewards)
    for row in range(3):
        assert torch.equal(group_advantages(rewards[row : row + 1])[0], together[row])


def test_a_group_has_a_signal_where_one_reward_differs() -> None:
    rewards = torch.tensor(
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    )
    assert has_signal(rewards).tolist() == [False, False, True, True, True]
    assert has_signal(torch.empty(0, 4)).tolist() == []


# the clipped loss


def random_batch(num_tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones and advantages in float64; ratios from about 0.4 to 2.5."""
    generator = torch_generator(seed, "batch")
    old = -3 * torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    new = old + 0.3 * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    return new, old, torch.randn(num_tokens, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.2, 0.28), (0.2, 0.2), (0.1, 3.0), (1.0, 0.01)])
def test_the_loss_and_its_gradient_token_by_token(clip_low: float, clip_high: float) -> None:
    new, old, advantages = random_batch()
    weights = torch.rand(200, generator=torch_generator(1, "weights"), dtype=torch.float64)
    new.requires_grad_()
    result = clipped_policy_loss(new, old, advantages, weights, clip_low=clip_low, clip_high=clip_high)
    result.loss.backward()
    loss, clipped, farthest, gradient = 0.0, 0, 0.0, []
    for log_prob, old_log_prob, advantage, weight in zip(
        new.tolist(), old.tolist(), advantages.tolist(), weights.tolist(), strict=True
    ):
        ratio = math.exp(log_prob - old_log_prob)
        limited = min(max(ratio, 1 - clip_low), 1 + clip_high)
        loss -= weight * min(ratio * advantage, limited * advantage)
        is_clipped = limited * advantage < ratio * advantage
        clipped += is_clipped
        farthest = max(farthest, abs(ratio - 1))
        # d/d log p of -ratio * A is the same again; a clipped token has no gradient
        gradient.append(0.0 if is_clipped else -weight * ratio * advantage)
    torch.testing.assert_close(result.loss.item(), loss)
    torch.testing.assert_close(new.grad, torch.tensor(gradient, dtype=torch.float64))
    assert result.num_clipped == clipped
    assert result.max_ratio_deviation == pytest.approx(farthest)
    assert 0 < clipped < 200


def test_the_gradient_is_autograds_of_the_textbook_formula_through_a_softmax() -> None:
    logits = torch.randn(30, 7, generator=torch_generator(3), dtype=torch.float64)
    tokens = torch.randint(7, (30,), generator=torch_generator(4))
    _, _, advantages = random_batch(30)
    old = (logits + 0.3 * torch.randn(30, 7, generator=torch_generator(5), dtype=torch.float64)).log_softmax(
        -1
    )

    def gradient(is_ours: bool) -> Tensor:
        leaf = logits.clone().requires_grad_()
        new = leaf.log_softmax(-1)[torch.arange(30), tokens]
        before = old[torch.arange(30), tokens]
        if is_ours:
            loss = clipped_policy_loss(
                new, before, advantages, torch.ones(30), clip_low=0.2, clip_high=0.28
            ).loss
        else:
            ratio = new.exp() / before.exp()
            unclipped, limited = ratio * advantages, torch.clamp(ratio, 0.8, 1.28) * advantages
            loss = -torch.where(unclipped < limited, unclipped, limited).sum()
        return torch.autograd.grad(loss, leaf)[0]

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_clipped"),
    [
        (1.27, 1.0, False),
        (1.29, 1.0, True),  # beyond clip_high
        (1.27, -1.0, False),
        (1.29, -1.0, False),  # a token that has become likelier and is bad is always pushed back
        (0.81, -1.0, False),
        (0.79, -1.0, True),  # beyond clip_low
        (0.79, 1.0, False),  # a good token that has become rarer is always pulled up
        (1.25, 1.0, False),  # clip-higher: the symmetric 0.2 would have clipped it
        (0.75, -1.0, True),  # and the low side stays at 0.2
        (3.0, 0.0, False),
    ],
)
def test_clip_higher_is_not_symmetric(ratio: float, advantage: float, is_clipped: bool) -> None:
    new = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, dtype=torch.float64)
    result = clipped_policy_loss(
        new,
        old,
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1),
        clip_low=0.2,
        clip_high=0.28,
    )
    result.loss.backward()
    assert result.num_clipped == int(is_clipped)
    bound = min(max(ratio, 0.8), 1.28) if is_clipped else ratio
    assert result.loss.item() == pytest.approx(-bound * advantage)
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(0.0 if is_clipped else -ratio * advantage)


def test_at_ratio_one_it_is_the_policy_gradient() -> None:
    new, _, advantages = random_batch()
    new.requires_grad_()
    result = clipped_policy_loss(new, new, advantages, torch.ones(200), clip_low=0.2, clip_high=0.28)
    result.loss.backward()
    # the old log-probabilities are constants: without their detaching the gradient would be 0
    torch.testing.assert_close(new.grad, -advantages)
    torch.testing.assert_close(result.loss.detach(), -advantages.sum())
    assert (result.num_clipped, result.max_ratio_deviation) == (0, 0.0)


def test_a_ratio_beyond_float32_is_a_number_and_pays_nothing_without_an_advantage() -> None:
    result = clipped_policy_loss(
        torch.zeros(2),
        torch.tensor([-95.0, -1000.0]),
        torch.zeros(2),
        torch.ones(2),
        clip_low=0.2,
        clip_high=0.28,
    )
    assert result.loss.item() == 0.0


def test_micro_batches_add_up() -> None:
    new, old, advantages = random_batch()
    whole = clipped_policy_loss(new, old, advantages, torch.ones(200), clip_low=0.2, clip_high=0.28)
    parts = [
        clipped_policy_loss(
            new[part], old[part], advantages[part], torch.ones(200)[part], clip_low=0.2, clip_high=0.28
        )
        for part in (slice(0, 70), slice(70, 71), slice(71, 200))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    assert sum(part.num_clipped for part in parts) == whole.num_clipped
    assert max(part.max_ratio_deviation for part in parts) == whole.max_ratio_deviation


def test_no_tokens_are_no_loss() -> None:
    nothing = torch.empty(0, requires_grad=True)
    result = clipped_policy_loss(nothing, nothing, nothing, nothing, clip_low=0.2, clip_high=0.28)
    result.loss.backward()
    assert (result.loss.item(), result.num_clipped, result.max_ratio_deviation) == (0.0, 0, 0.0)


# what tokens count


def test_weights_of_each_aggregation_by_hand() -> None:
    counted = torch.tensor([2, 0, 6])
    assert aggregation_weights(counted, "dapo", 10).tolist() == [1 / 8] * 3
    # the masked response has no token, and is one of the three all the same
    assert aggregation_weights(counted, "grpo", 10).tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 18])
    assert aggregation_weights(counted, "dr_grpo", 10).tolist() == pytest.approx([1 / 30] * 3)
    assert aggregation_weights(torch.tensor([0, 0]), "dapo", 10).isfinite().all()


def test_advantages_without_the_division() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4])
    assert torch.equal(group_advantages(rewards, "none"), expected)


def test_importance_weights_are_capped_above_alone() -> None:
    trainer = torch.tensor([-1.0, -1.0, -9.0], requires_grad=True)
    weights = truncated_importance(trainer, torch.tensor([-1.0, -9.0, -1.0]), 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, math.exp(-8)]))
    assert not weights.requires_grad


# settings

TASK = TaskConfig(kind="synthetic")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"{name} must be at least 1, not 0")
            for name in (
                "num_problems",
                "num_steps",
                "prompts_per_step",
                "micro_batch_rows",
                "log_every",
                "save_every",
            )
        ),
        ({"samples_per_prompt": 1}, "samples_per_prompt must be at least 2"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0, not nan"),
        ({"max_refills": -1}, "must be 0 or more"),
        ({"warmup_steps": -1}, "must be 0 or more"),
        ({"eval_every": -1}, "must be 0 or more"),
        ({"clip_low": 0.0}, r"clip_low must lie in \(0, 1\]"),
        ({"clip_low": 1.1}, r"clip_low must lie in \(0, 1\]"),
        ({"clip_high": 0.0}, "clip_high above 0"),
        ({"entropy_bonus": -0.1}, "entropy_bonus must be 0 or more and finite, not -0.1"),
        ({"importance_cap": 0.0}, "importance_cap must be above 0, not 0.0"),
        ({"importance_cap": 2.0, "old_log_probs": "sampler"}, "with 'sampler' the ratio corrects already"),
        ({"rollout": RolloutConfig(engine="vllm")}, "write importance_cap = 2.0"),
        ({"engine": EngineConfig(compile=True)}, "engine.compile is not for reinforcement learning"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, not 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0, not nan"),
        ({"length_schedule": ()}, "length_schedule needs"),
        ({"length_schedule": (LengthPhase(max_new_tokens=8, until_step=5),)}, "a last phase without one"),
        (
            {"length_schedule": (LengthPhase(max_new_tokens=8), LengthPhase(max_new_tokens=9))},
            "length_schedule needs rising until_step",
        ),
        *(
            (
                {
                    "length_schedule": (
                        LengthPhase(max_new_tokens=8, until_step=first),
                        LengthPhase(max_new_tokens=9, until_step=second),
                        LengthPhase(max_new_tokens=10),
                    )
                },
                "length_schedule needs rising until_step",
            )
            for first, second in ((5, 4), (5, 5))
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RLConfig(task=TASK, **changes)


def test_phases_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        LengthPhase(max_new_tokens=0)
    with pytest.raises(ValueError, match="until_step must be at least 1, not 0"):
        LengthPhase(max_new_tokens=8, until_step=0)


def test_the_length_follows_the_schedule() -> None:
    paper = RLConfig(task=TASK)
    assert [paper.max_new_tokens(step) for step in (1, 700, 701, 1000)] == [8192, 8192, 16384, 16384]
    phases = tuple(
        LengthPhase(max_new_tokens=tokens, until_step=until) for tokens, until in ((4, 1), (8, 3), (6, None))
    )
    config = RLConfig(task=TASK, length_schedule=phases)
    assert [config.max_new_tokens(step) for step in range(1, 6)] == [4, 8, 8, 6, 6]
    assert RLConfig(task=TASK, length_schedule=phases[2:]).max_new_tokens(1) == 6


def test_milestones_are_the_evaluated_steps_and_the_last() -> None:
    config = RLConfig(task=TASK, num_steps=7, eval_every=3)
    assert [step for step in range(1, 8) if config.is_milestone(step)] == [3, 6, 7]
    last_only = RLConfig(task=TASK, num_steps=7)
    assert [step for step in range(1, 8) if last_only.is_milestone(step)] == [7]


def test_the_defaults_are_the_papers() -> None:
    config = RLConfig(task=TASK)
    assert (config.num_steps, config.prompts_per_step, config.samples_per_prompt) == (1000, 128, 16)
    assert (config.learning_rate, config.warmup_steps, config.temperature) == (1e-6, 0, 1.0)
    assert (config.clip_low, config.clip_high) == (0.2, 0.28)
    assert config.optimizer.weight_decay == 0.0
