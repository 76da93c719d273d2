"""The GRPO loop: its update against autograd, its learning on a task that must be learnable, its resume to the byte."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_study import (
    GradientRecorder,
    Killed,
    Vocabulary,
    crash_on_call,
    find_run,
    make_run,
    outcome,
    study_config,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlprior.config import UsageError
from rlprior.data.packing import Corpus
from rlprior.data.prepare import prepare
from rlprior.models.causal_lm import build_model, load_tokenizer, save_model
from rlprior.models.sampler import Response
from rlprior.rl import loop
from rlprior.rl import rollout as rollout_module
from rlprior.rl.config import LengthPhase, RLConfig
from rlprior.rl.grpo import STD_EPSILON
from rlprior.rl.loop import RLRunConfig, policy_update
from rlprior.rl.rollout import Group
from rlprior.runs import read_jsonl
from rlprior.study.plan import plan_study
from rlprior.study.runner import execute
from rlprior.tasks.config import TaskConfig
from rlprior.tasks.problem import Problem, Status, Verdict
from rlprior.training import checkpoint as checkpoint_module
from rlprior.training.checkpoint import CheckpointSaver, checkpoint_directory, tokens_seen

CONFIG = study_config()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy as a Hugging Face folder."""
    root = tmp_path_factory.mktemp("policy")
    prepare(CONFIG.data, root / "corpus")
    tokenizer_directory = Corpus.open(root / "corpus").tokenizer_directory
    model = build_model(CONFIG.model, load_tokenizer(tokenizer_directory), max_positions=64, seed=0)
    save_model(model, root / "policy", tokenizer_directory=tokenizer_directory)
    return root / "policy"


def spread_model() -> Any:
    """A model whose probabilities differ by orders of magnitude, so that no error hides in near-uniform rows."""
    config = dataclasses.replace(CONFIG.model, initializer_range=0.2)

    return build_model(config, Vocabulary(50), max_positions=64, seed=0)


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
        for _ in range(num_samples):
            ids = draw(3, 50, draw(1, 9, 1)[0])
            exact = token_log_probs(model, prompt, ids, temperature=0.7).detach()
            noise = 0.3 * torch.randn(len(ids), generator=generator)
            responses.append(Response(ids, (exact + noise).tolist(), "length"))
        correct = [True] * num_samples if number == num_groups - 1 else [True, *[False] * (num_samples - 1)]
        verdicts = [Verdict(Status.CORRECT if right else Status.WRONG, "1") for right in correct]
        groups.append(Group(prompt, responses, verdicts))
    return groups


def token_log_probs(model: Any, prompt: list[int], ids: list[int], *, temperature: float) -> Tensor:
    """Of each response token, by one plain forward pass of the unpadded row."""
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def brute_force(model: Any, groups: list[Group], config: RLConfig) -> tuple[Tensor, int]:
    """The loss as the formulas are written, token by token, and how many tokens are clipped."""
    total, num_tokens, num_clipped = torch.zeros(()), 0, 0
    for group in groups:
        rewards = torch.tensor(group.rewards)
        advantages = (rewards - rewards.mean()) / (rewards.std() + STD_EPSILON)
        for response, advantage in zip(group.responses, advantages, strict=True):
            new = token_log_probs(model, group.prompt_ids, response.token_ids, temperature=config.temperature)
            old = new.detach() if config.old_log_probs == "trainer" else torch.tensor(response.log_probs)
            for ratio in torch.exp(new - old):
                plain = ratio * advantage
                limited = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage
                total = total - (plain if plain <= limited else limited)
                num_clipped += bool(limited < plain)
                num_tokens += 1
    return total / num_tokens, num_clipped


@pytest.mark.parametrize("old_log_probs", ["trainer", "sampler"])
@pytest.mark.parametrize("micro_batch_rows", [1, 5, 64])
def test_update_equals_the_formulas_by_autograd(old_log_probs: Any, micro_batch_rows: int) -> None:
    groups = random_groups()
    config = dataclasses.replace(
        CONFIG.rl, temperature=0.7, old_log_probs=old_log_probs, micro_batch_rows=micro_batch_rows
    )
    model = spread_model()
    recorder: Any = GradientRecorder(model)
    measured = policy_update(model, recorder, groups, config, rate=0.0, step=1)
    loss, num_clipped = brute_force(model, groups, config)
    loss.backward()
    num_tokens = sum(len(response.token_ids) for group in groups for response in group.responses)
    # float32: sums of some dozens of terms of size 1
    assert measured["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert measured["clip_share"] == num_clipped / num_tokens
    assert (num_clipped > 0) == (old_log_probs == "sampler")
    for gradient, parameter in zip(recorder.gradients, model.parameters(), strict=True):
        expected = parameter.grad
        assert expected.abs().max() > 1e-3, "a gradient of nothing proves nothing"
        # rows padded together against rows alone: about 1e-6 of the largest entry
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_logged_figures_of_an_update() -> None:
    groups, model = random_groups(), spread_model()
    recorder: Any = GradientRecorder(model)
    config = dataclasses.replace(CONFIG.rl, temperature=0.7, old_log_probs="sampler")
    measured = policy_update(model, recorder, groups, config, rate=0.0, step=1)
    entropies, gaps = [], []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response.token_ids])
            logits = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].detach() / 0.7
            log_p = logits.log_softmax(-1)
            entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
            new = log_p.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            gaps += (new - torch.tensor(response.log_probs)).tolist()
    # float32 log-probabilities near 10 are good to 1e-6
    assert measured["entropy_nats"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert measured["sampler_gap_nats"] == pytest.approx(max(abs(gap) for gap in gaps), abs=1e-5)
    deviations = [abs(torch.tensor(gap).exp().item() - 1) for gap in gaps]
    assert measured["max_ratio_deviation"] == pytest.approx(max(deviations), abs=1e-4)


def contains_digit(problem: Problem, response: str, *, truncated: bool = False) -> Verdict:
    """A task that chance solves now and then, and one preference learns."""
    right = any(character.isdigit() for character in response)
    return Verdict(Status.CORRECT if right else Status.WRONG, response)


def contains_none(problem: Problem, response: str, *, truncated: bool = False) -> Verdict:
    right = not any(character.isdigit() for character in response)
    return Verdict(Status.CORRECT if right else Status.WRONG, response)


def learn(policy: Path, directory: Path, **changes: Any) -> list[dict[str, Any]]:
    config = dataclasses.replace(
        CONFIG.rl,
        **{
            "num_steps": 30,
            "prompts_per_step": 4,
            "samples_per_prompt": 8,
            "dynamic_sampling": "refill",
            "length_schedule": (LengthPhase(max_new_tokens=6),),
            "learning_rate": 1e-2,
            "save_every": 30,
            **changes,
        },
    )
    planned = make_run("rl", RLRunConfig(rl=config, init_from=str(policy)), directory)
    return read_jsonl(planned.directory / "metrics.jsonl")


@pytest.mark.parametrize("old_log_probs", ["trainer", "sampler"])
def test_reward_rises_where_it_can_be_learned(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_log_probs: str
) -> None:
    monkeypatch.setattr(rollout_module, "verify", contains_digit)
    metrics = learn(policy, tmp_path / "run", old_log_probs=old_log_probs)
    rewards = [record["reward_mean"] for record in metrics]
    # 10 digits among 300 tokens, 6 draws: 0.18 by chance
    assert 0.05 < rewards[0] < 0.4
    assert sum(rewards[-3:]) / 3 > 0.8
    # the sampler and the trainer compute one distribution; float32 log-probabilities near 6 are good to 1e-6
    assert max(record.get("sampler_gap_nats", 0.0) for record in metrics) < 1e-4
    if old_log_probs == "trainer":
        assert {record.get("max_ratio_deviation", 0.0) for record in metrics} == {0.0}
    else:
        deviations = [record.get("max_ratio_deviation", 0.0) for record in metrics]
        assert 0 < max(deviations) < 1e-4


def test_reward_follows_the_verdict_and_not_the_text(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The opposite verdict teaches the opposite: a sign error would pass one of the two tests, never both."""
    monkeypatch.setattr(rollout_module, "verify", contains_none)
    metrics = learn(policy, tmp_path / "run", num_steps=40, save_every=40)
    rewards = [record["reward_mean"] for record in metrics]
    assert 0.6 < rewards[0] < 0.95
    assert sum(rewards[-10:]) / 10 > 0.95


def test_the_length_schedule_shows_in_the_responses(policy: Path, tmp_path: Path) -> None:
    planned = make_run("rl", RLRunConfig(rl=CONFIG.rl, init_from=str(policy)), tmp_path / "run")
    lengths = [record["response_tokens_p90"] for record in read_jsonl(planned.directory / "metrics.jsonl")]
    assert lengths == [6, 6, 8, 8]


def test_the_documented_names_are_those_that_are_logged(policy: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "rl.md").read_text(encoding="utf-8")
    table, timing = text.split("## What is logged each step")[1].split("`timing.jsonl`")
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    run = make_run("rl", RLRunConfig(rl=CONFIG.rl, init_from=str(policy)), tmp_path)
    records = read_jsonl(run.directory / "metrics.jsonl")
    assert set().union(*records) == documented
    for record in read_jsonl(run.directory / "timing.jsonl"):
        assert record.keys() - {"step"} == {"rollout_tokens_per_second", "step_seconds"}
        assert all(f"`{name}`" in timing for name in record.keys() - {"step"})


def test_steps_without_a_group_are_counted_and_change_nothing(policy: Path, tmp_path: Path) -> None:
    """An untrained policy answers no sum: every group is dead, after every refill."""
    metrics = learn(policy, tmp_path / "run", num_steps=3, save_every=1, max_refills=2)
    assert [record["num_empty_steps"] for record in metrics] == [1, 2, 3]
    assert [record["num_groups_kept"] for record in metrics] == [0, 0, 0]
    assert all("loss" not in record and "reward_mean_kept" not in record for record in metrics)
    last = checkpoint_directory(tmp_path / "run", 3)
    state = checkpoint_module.list_checkpoints(tmp_path / "run")[-1].state
    assert state["cursor"] == 3 * 4 * 3
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, last))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


CRASHES = {
    "before anything is saved": (loop, "policy_update", 1, True),
    "during a rollout": (loop, "collect_rollout", 4, False),
    "between rollout and update": (loop, "policy_update", 4, False),
    "between weights and optimizer state": (checkpoint_module, "save_file", 2, False),
    "after the rename, before pruning": (checkpoint_module, "_prune", 2, False),
    "after the last checkpoint": (CheckpointSaver, "save", 3, True),
}


@pytest.mark.parametrize("where", CRASHES)
def test_a_crash_changes_no_byte(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(rollout_module, "verify", contains_digit)
    rl = dataclasses.replace(
        CONFIG.rl,
        num_steps=6,
        samples_per_prompt=8,
        dynamic_sampling="refill",
        max_refills=1,
        learning_rate=1e-2,
    )
    config = RLRunConfig(rl=rl, init_from=str(policy))
    whole = make_run("rl", config, tmp_path / "whole")
    records = read_jsonl(whole.directory / "metrics.jsonl")
    assert all(record["gradient_norm"] > 0 for record in records), (
        "without updates there is nothing to resume"
    )
    module, name, number, after = CRASHES[where]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, crash_on_call(number, after, getattr(module, name)))
        with pytest.raises(Killed):
            make_run("rl", config, tmp_path / "crashed")
    assert not (tmp_path / "crashed" / "result.json").exists()
    steps: list[int] = []
    original = loop.collect_rollout

    def count(*args: Any, **kwargs: Any) -> Any:
        steps.append(kwargs["step"])
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "collect_rollout", count)
    resumed = make_run("rl", config, tmp_path / "crashed")
    assert outcome(resumed.directory) == outcome(whole.directory)
    if where != "before anything is saved":
        assert len(steps) < rl.num_steps, "it began anew instead of going on"


def test_training_tokens_are_carried_through(tmp_path: Path) -> None:
    """The number that the curves over tokens end with."""
    config = study_config("arms={ce={label='ce', objective={name='cross_entropy'}}}")
    plan = plan_study(config, tmp_path)
    for planned in plan:
        if planned.stage != "evaluate":
            execute(planned)
    rl = find_run(plan, "rl ce s0")
    last = checkpoint_directory(rl.directory, config.rl.num_steps)
    assert tokens_seen(last) == config.pretrain.num_tokens + config.midtrain.num_tokens


def test_a_task_without_enough_problems_is_an_error_that_says_so(policy: Path, tmp_path: Path) -> None:
    task = TaskConfig(families=("addition",), difficulties=(1,))
    rl = dataclasses.replace(CONFIG.rl, task=task, num_problems=100_000)
    with pytest.raises(UsageError, match=r"100000 different train problems .* exist; ask for fewer"):
        make_run("rl", RLRunConfig(rl=rl, init_from=str(policy)), tmp_path / "run")
