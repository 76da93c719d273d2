"""One update against the formulas by autograd: every option, every way of cutting the batch up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from tests.small_study import GradientRecorder, Vocabulary, study_config
from torch import Tensor

from rlprior.models.causal_lm import build_model
from rlprior.rl import update as update_module
from rlprior.rl.config import LengthPhase, RLConfig
from rlprior.rl.grpo import STD_EPSILON
from rlprior.rl.rollout import Group
from rlprior.rl.update import PolicyLogProbs, TrainingRow, policy_update, share_out
from rlprior.sampling.sampler import Response
from rlprior.tasks.problem import Status, Verdict

MAX_NEW_TOKENS = 12
CONFIG = dataclasses.replace(
    study_config().rl, temperature=0.7, length_schedule=(LengthPhase(max_new_tokens=MAX_NEW_TOKENS),)
)


def spread_model() -> Any:
    """A model whose probabilities differ by orders of magnitude, so that no error hides in near-uniform rows."""
    shape = dataclasses.replace(study_config().model, initializer_range=0.2)
    return build_model(shape, Vocabulary(50), max_positions=64, seed=0)


def token_logits(model: Any, prompt: list[int], ids: list[int], config: RLConfig) -> Tensor:
    """At each response token, by one plain forward pass of the unpadded row."""
    return model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / config.temperature


def token_log_probs(model: Any, prompt: list[int], ids: list[int], config: RLConfig) -> Tensor:
    log_probs = token_logits(model, prompt, ids, config).log_softmax(-1)
    return log_probs.gather(1, torch.tensor(ids)[:, None])[:, 0]


def random_groups(num_groups: int = 4, num_samples: int = 3) -> list[Group]:
    """Groups of ragged lengths, the last of them without a signal; log-probabilities near the policy's, but not equal."""
    generator = torch.Generator().manual_seed(0)
    model = spread_model()

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    groups: list[Group] = []
    for number in range(num_groups):
        prompt = draw(3, 50, 2 + number)
        responses = []
        for place in range(num_samples):
            ids = draw(3, 50, draw(1, 9, 1)[0])
            exact = token_log_probs(model, prompt, ids, CONFIG).detach()
            noise = 0.3 * torch.randn(len(ids), generator=generator)
            responses.append(Response(ids, (exact + noise).tolist(), "length" if place == 1 else "stop"))
        correct = [True] * num_samples if number == num_groups - 1 else [True, *[False] * (num_samples - 1)]
        verdicts = [Verdict(Status.CORRECT if right else Status.WRONG, "1") for right in correct]
        groups.append(Group(prompt, responses, verdicts))
    return groups


def brute_force(model: Any, groups: list[Group], config: RLConfig) -> tuple[Tensor, int]:
    """The loss as the formulas are written, token by token, and how many tokens are clipped."""
    rows = []
    for group in groups:
        rewards = torch.tensor(group.rewards)
        advantages = rewards - rewards.mean()
        if config.scale_rewards == "group":
            advantages = advantages / (rewards.std() + STD_EPSILON)
        for response, advantage in zip(group.responses, advantages, strict=True):
            is_masked = config.mask_truncated and response.finish_reason == "length"
            rows.append((group.prompt_ids, response, float(advantage), is_masked))
    num_tokens = sum(len(response.token_ids) for _, response, _, is_masked in rows if not is_masked)
    total, entropy, num_clipped = torch.zeros(()), torch.zeros(()), 0
    for prompt, response, drawn_advantage, is_masked in rows:
        advantage = drawn_advantage
        if (config.signal == "positive" and advantage < 0) or (config.signal == "negative" and advantage > 0):
            advantage = 0.0
        new = token_log_probs(model, prompt, response.token_ids, config)
        sampler = torch.tensor(response.log_probs)
        old = new.detach() if config.old_log_probs == "trainer" else sampler
        log_p = token_logits(model, prompt, response.token_ids, config).log_softmax(-1)
        weight = {
            "dapo": 1 / num_tokens,
            "grpo": 1 / (len(rows) * len(response.token_ids)),
            "dr_grpo": 1 / (len(rows) * MAX_NEW_TOKENS),
        }[config.loss_aggregation]
        for place, ratio in enumerate(torch.exp(new - old)):
            plain = ratio * advantage
            limited = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage
            num_clipped += bool(limited < plain)
            if is_masked:
                continue
            correction = 1.0
            if config.importance_cap is not None:
                correction = min(float((new[place].detach() - sampler[place]).exp()), config.importance_cap)
            total = total - weight * correction * (plain if plain <= limited else limited)
            entropy = entropy - (log_p[place].exp() * log_p[place]).sum() / num_tokens
    return total - config.entropy_bonus * entropy, num_clipped


OPTIONS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "the sampler's log-probabilities": {"old_log_probs": "sampler"},
    "a mean of means": {"loss_aggregation": "grpo"},
    "a constant divisor, unscaled": {"loss_aggregation": "dr_grpo", "scale_rewards": "none"},
    "positive signal": {"signal": "positive"},
    "negative signal": {"signal": "negative", "old_log_probs": "sampler"},
    "cut responses masked": {"mask_truncated": True},
    "cut responses masked in a mean of means": {"mask_truncated": True, "loss_aggregation": "grpo"},
    "an entropy bonus": {"entropy_bonus": 0.3, "mask_truncated": True},
    "importance weights": {"importance_cap": 1.1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("micro_batch_rows", [1, 5, 64])
def test_update_equals_the_formulas_by_autograd(options: str, micro_batch_rows: int) -> None:
    groups = random_groups()
    config = dataclasses.replace(CONFIG, micro_batch_rows=micro_batch_rows, **OPTIONS[options])
    model = spread_model()
    recorder: Any = GradientRecorder(model)
    measured = policy_update(PolicyLogProbs(model), recorder, groups, config, rate=0.0, step=1)
    loss, num_clipped = brute_force(model, groups, config)
    loss.backward()
    num_tokens = sum(len(response.token_ids) for group in groups for response in group.responses)
    # float32: sums of some dozens of terms of size 1
    assert measured["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert measured["clip_share"] == num_clipped / num_tokens
    assert (num_clipped > 0) == (config.old_log_probs == "sampler")
    for gradient, parameter in zip(recorder.gradients, model.parameters(), strict=True):
        expected = parameter.grad
        assert expected.abs().max() > 1e-4, "a gradient of nothing proves nothing"
        # rows padded together against rows alone: about 1e-6 of the largest entry
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_each_option_changes_the_gradient() -> None:
    """Otherwise the formulas above could agree on nothing."""
    found = {}
    for name, options in OPTIONS.items():
        model = spread_model()
        recorder: Any = GradientRecorder(model)
        config = dataclasses.replace(CONFIG, **options)
        policy_update(PolicyLogProbs(model), recorder, random_groups(), config, rate=0.0, step=1)
        found[name] = torch.cat([gradient.flatten() for gradient in recorder.gradients])
    names = list(found)
    for place, one in enumerate(names):
        for other in names[:place]:
            assert (found[one] - found[other]).norm() > 1e-2 * found[one].norm(), (one, other)


def test_the_entropy_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, entropy_bonus=0.3)
    gradients = []
    for size in (1024, 3):
        monkeypatch.setattr(update_module, "ENTROPY_CHUNK_TOKENS", size)
        model = spread_model()
        recorder: Any = GradientRecorder(model)
        policy_update(PolicyLogProbs(model), recorder, random_groups(), config, rate=0.0, step=1)
        gradients.append(recorder.gradients)
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize(
    "changes", [{"signal": "positive"}, {"mask_truncated": True}], ids=["no advantage above 0", "all cut"]
)
def test_nothing_to_learn_is_no_update(changes: dict[str, Any]) -> None:
    """Adam would move the weights by its momentum alone."""
    [group] = random_groups(1)
    if "signal" in changes:
        verdicts = [Verdict(Status.CORRECT, "1")] * 3
    else:
        verdicts = group.verdicts
    cut = [dataclasses.replace(response, finish_reason="length") for response in group.responses]
    group = Group(group.prompt_ids, cut, verdicts)
    recorder: Any = GradientRecorder(spread_model())
    config = dataclasses.replace(CONFIG, **changes)
    assert policy_update(PolicyLogProbs(recorder.model), recorder, [group], config, rate=0.0, step=1) == {}
    assert recorder.gradients == []


def test_what_is_not_a_number_is_seen_in_the_log() -> None:
    model = spread_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    recorder: Any = GradientRecorder(model)
    measured = policy_update(PolicyLogProbs(model), recorder, random_groups(), CONFIG, rate=0.0, step=1)
    assert math.isnan(measured["sampler_gap_nats"])
    assert math.isnan(measured["loss"])


def test_logged_figures_of_an_update() -> None:
    groups, model = random_groups(), spread_model()
    recorder: Any = GradientRecorder(model)
    config = dataclasses.replace(CONFIG, old_log_probs="sampler")
    measured = policy_update(PolicyLogProbs(model), recorder, groups, config, rate=0.0, step=1)
    entropies, gaps = [], []
    for group in groups:
        for response in group.responses:
            log_p = token_logits(model, group.prompt_ids, response.token_ids, config).detach().log_softmax(-1)
            entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
            new = log_p.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            gaps += (new - torch.tensor(response.log_probs)).tolist()
    # float32 log-probabilities near 10 are good to 1e-6
    assert measured["entropy_nats"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert measured["sampler_gap_nats"] == pytest.approx(max(abs(gap) for gap in gaps), abs=1e-5)
    ratios = torch.tensor(gaps, dtype=torch.float64).exp()
    assert measured["max_ratio_deviation"] == pytest.approx(float((ratios - 1).abs().max()), abs=1e-4)
    expected = float((ratios - 1 - ratios.log()).mean())
    assert measured["sampler_kl_nats"] == pytest.approx(expected, rel=1e-4)


def test_groups_are_shared_out_whole_and_evenly() -> None:
    lengths = [9, 1, 1, 1, 8, 2, 2]
    groups = [
        [TrainingRow([3], Response([4] * length, [], "stop"), float(number), 1.0)] * 2
        for number, length in enumerate(lengths)
    ]
    for num_shares in (1, 2, 3, 9):
        shares = share_out(groups, num_shares)
        where = [{row.advantage for row in share} for share in shares]
        assert sorted(number for numbers in where for number in numbers) == sorted(range(7))
        assert sum(map(len, shares)) == 14
        for share in shares:
            assert [row.num_positions for row in share] == sorted(row.num_positions for row in share)
    loads = [sum(row.num_positions for row in share) for share in share_out(groups, 2)]
    assert loads == [30, 32]


def test_a_process_without_rows_takes_part_with_a_gradient_of_zero() -> None:
    """Sharding needs each process in each pass."""
    model = spread_model()
    loss, sums, largest = update_module.loss_of_rows(PolicyLogProbs(model), [], CONFIG, num_counted=1)
    loss.backward()
    assert loss.item() == 0.0
    assert not any(sums.values())
    assert not any(largest.values())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
