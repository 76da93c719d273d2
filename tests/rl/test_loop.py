"""The GRPO loop: its learning on a task that must be learnable, its resume to the byte."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_study import (
    Killed,
    crash_on_call,
    find_run,
    make_run,
    outcome,
    study_config,
)
from transformers import AutoModelForCausalLM

from rlprior.config import UsageError
from rlprior.data.packing import Corpus
from rlprior.data.prepare import prepare
from rlprior.models.causal_lm import build_model, load_tokenizer, save_model
from rlprior.rl import loop
from rlprior.rl.config import LengthPhase
from rlprior.rl.loop import RLRunConfig
from rlprior.runs.files import read_jsonl
from rlprior.study.plan import plan_study
from rlprior.study.runner import execute
from rlprior.tasks import verifier as verifier_module
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
    monkeypatch.setattr(verifier_module, "verify", contains_digit)
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
    monkeypatch.setattr(verifier_module, "verify", contains_none)
    metrics = learn(policy, tmp_path / "run", num_steps=40, save_every=40)
    rewards = [record["reward_mean"] for record in metrics]
    assert 0.6 < rewards[0] < 0.95
    assert sum(rewards[-10:]) / 10 > 0.95


def test_the_length_schedule_shows_in_the_responses(policy: Path, tmp_path: Path) -> None:
    planned = make_run("rl", RLRunConfig(rl=CONFIG.rl, init_from=str(policy)), tmp_path / "run")
    lengths = [record["response_tokens_p90"] for record in read_jsonl(planned.directory / "metrics.jsonl")]
    assert lengths == [6, 6, 8, 8]


def test_the_documented_names_are_those_that_are_logged(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier_module, "verify", contains_digit)
    text = (Path(__file__).parents[2] / "docs" / "rl.md").read_text(encoding="utf-8")
    table, timing = text.split("## What is logged each step")[1].split("`timing.jsonl`")
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    run = make_run("rl", RLRunConfig(rl=CONFIG.rl, init_from=str(policy)), tmp_path)
    records = read_jsonl(run.directory / "metrics.jsonl")
    assert set().union(*records) == documented
    for record in read_jsonl(run.directory / "timing.jsonl"):
        assert record.keys() - {"step"} == {
            "rollout_tokens_per_second",
            "update_tokens_per_second",
            "step_seconds",
        }
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
    monkeypatch.setattr(verifier_module, "verify", contains_digit)
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
