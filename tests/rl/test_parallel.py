"""Reinforcement learning under torchrun: the steps of one process, whatever their number, and a run that goes on with another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.small_study import last_checkpoint, rl_tables, run_cli, torchrun, train_small_model, write_toml

from rlprior.runs.files import read_jsonl

NUM_STEPS = 6


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return last_checkpoint(train_small_model(tmp_path_factory.mktemp("policy")))


def write_config(directory: Path) -> Path:
    """Six steps with refills on a reward that chance earns now and then, saved after three."""
    (directory / "reward.py").write_text(
        "def has_digit(prompt, response, answer):\n    return float(any(map(str.isdigit, response)))\n"
    )
    tables = rl_tables(
        f"rl.num_steps={NUM_STEPS}",
        "rl.prompts_per_step=5",
        "rl.samples_per_prompt=4",
        "rl.dynamic_sampling='refill'",
        "rl.max_refills=2",
        "rl.micro_batch_rows=3",
        "rl.learning_rate=1e-3",
        "rl.eval_every=3",
        "rl.save_every=3",
        "rl.task.verifier='reward.py:has_digit'",
    )
    return write_toml(directory / "rl.toml", {**tables, "data_dir": str(directory)})


def learn(num_processes: int, policy: Path, file: Path, out: Path) -> list[dict[str, Any]]:
    arguments = ["rl", file, "--init-from", policy, "--out", out]
    done = run_cli(*arguments) if num_processes == 1 else torchrun(num_processes, *arguments)
    assert done.returncode == 0, done.stderr
    return read_jsonl(out / "metrics.jsonl")


def assert_same_steps(ours: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(ours) == len(expected) == NUM_STEPS
    assert all(record["gradient_norm"] > 0 for record in expected), (
        "without updates there is nothing to compare"
    )
    assert any(record["num_refills"] > 0 for record in expected)
    for one, other in zip(ours, expected, strict=True):
        assert one.keys() == other.keys()
        # the same tokens were drawn: lengths, verdicts and refills are equal to the last digit
        for name in ("reward_mean", "num_groups_drawn", "num_refills", "response_tokens_mean"):
            assert one[name] == other[name]
        # sums in another order, over some steps of Adam, whose first steps have the size of the rate whatever the gradient
        for name in ("loss", "entropy_nats", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-4)


@pytest.mark.slow
def test_two_and_three_processes_make_the_steps_of_one(policy: Path, tmp_path: Path) -> None:
    """Three do not divide five groups: shares differ, and so do the numbers of micro-batches."""
    file = write_config(tmp_path)
    alone = learn(1, policy, file, tmp_path / "alone")
    for num_processes in (2, 3):
        out = tmp_path / str(num_processes)
        assert_same_steps(learn(num_processes, policy, file, out), alone)
        # what another number of processes goes on from
        resumed = tmp_path / f"{num_processes} then 1"
        shutil.copytree(out, resumed)
        (resumed / "result.json").unlink()
        shutil.rmtree(resumed / "checkpoints" / f"step-{NUM_STEPS:08d}")
        assert_same_steps(learn(1, policy, file, resumed), alone)
        state = json.loads((resumed / "result.json").read_text())
        assert state == json.loads((tmp_path / "alone" / "result.json").read_text())
