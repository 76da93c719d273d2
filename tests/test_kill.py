"""SIGKILL at random moments of the real commands: the bytes at the end are those of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.small_study import (
    command,
    environment,
    find_run,
    last_checkpoint,
    make_runs,
    outcome,
    rl_tables,
    run_cli,
    study_config,
    study_tables,
    train_small_model,
    train_tables,
    write_toml,
)

from rlprior.cli import main
from rlprior.runs.files import read_jsonl
from rlprior.study.plan import PlannedRun, plan_study
from rlprior.study.runner import execute
from rlprior.training.checkpoint import checkpoint_directory, list_checkpoints

TIMEOUT_SECONDS = 300


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for a condition; an assertion where the process ends or time runs out before."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)


def living_processes(group: int) -> list[int]:
    """Processes of a group that are neither dead nor waiting to be reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended while we looked
        if int(process_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def start(arguments: list[str | Path], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_after(
    arguments: list[str | Path], cwd: Path, condition: Callable[[], bool], delay_seconds: float
) -> int:
    """Start the command, wait for the condition and a moment more, and SIGKILL it alone; returns its process group."""
    process = start(arguments, cwd)
    try:
        wait_until(condition, process)
        time.sleep(delay_seconds)
        assert process.poll() is None, "it was finished before it could be killed; make the run longer"
    finally:
        process.kill()
        process.communicate()
    return process.pid


def num_records(run: Path) -> int:
    return len(read_jsonl(run / "metrics.jsonl"))


def kill_several_times(arguments: list[str | Path], run: Path, cwd: Path, num_kills: int) -> None:
    """Kill the command while it makes `run`, each time at a random moment after it has got further."""
    seed = random.randrange(2**32)
    print(f"delays drawn with seed {seed}")
    delays = random.Random(seed)
    for _ in range(num_kills):
        before = num_records(run)
        kill_after(arguments, cwd, lambda before=before: num_records(run) > before, delays.uniform(0, 0.4))
        assert not (run / "result.json").exists()


def train_command(directory: Path, num_steps: int) -> tuple[list[str | Path], list[str | Path]]:
    """One training under two names: to be made in peace, and to be killed. A checkpoint every fifth step."""
    tables = train_tables(
        f"training.num_steps={num_steps}", "training.save_every=5", "training.eval_every=50"
    )
    path = write_toml(directory / "train.toml", tables)
    return ["train", path, "--out", directory / "whole"], ["train", path, "--out", directory / "killed"]


def test_training_killed_once(tmp_path: Path) -> None:
    whole, killed = train_command(tmp_path, num_steps=150)
    assert main([str(argument) for argument in whole]) == 0
    kill_several_times(killed, tmp_path / "killed", tmp_path, num_kills=1)
    assert main([str(argument) for argument in killed]) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_training_killed_five_times(tmp_path: Path) -> None:
    whole, killed = train_command(tmp_path, num_steps=600)
    assert run_cli(*whole, cwd=tmp_path).returncode == 0
    kill_several_times(killed, tmp_path / "killed", tmp_path, num_kills=5)
    assert run_cli(*killed, cwd=tmp_path).returncode == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_reinforcement_learning_killed_five_times(tmp_path: Path) -> None:
    # enough pre-training for some answers to be right: without a reward nothing would change, killed or not
    config = study_config("pretrain.num_steps=400", "pretrain.save_every=400", "pretrain.eval_every=0")
    _, pretrain = make_runs(tmp_path / "study", "data", "pretrain ce s0", config=config)
    tables = rl_tables(
        "rl.num_steps=120",
        "rl.save_every=2",
        "rl.dynamic_sampling=refill",
        "rl.max_refills=1",
        "rl.samples_per_prompt=8",
        "rl.length_schedule=[{until_step=40, max_new_tokens=24}, {max_new_tokens=32}]",
    )
    path = write_toml(tmp_path / "rl.toml", tables)
    common: list[str | Path] = ["rl", path, "--init-from", checkpoint_directory(pretrain.directory, 400)]
    whole, killed = [*common, "--out", tmp_path / "whole"], [*common, "--out", tmp_path / "killed"]
    assert run_cli(*whole, cwd=tmp_path).returncode == 0
    metrics = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert sum(record.get("gradient_norm", 0.0) > 0 for record in metrics) > 30
    kill_several_times(killed, tmp_path / "killed", tmp_path, num_kills=5)
    assert run_cli(*killed, cwd=tmp_path).returncode == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def done_runs(plan: list[PlannedRun]) -> dict[str, int]:
    """Label of each finished run, and when it was finished."""
    return {p.label: (p.directory / "result.json").stat().st_mtime_ns for p in plan if p.is_done}


@pytest.mark.slow
def test_a_killed_study_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    overrides = (
        "pretrain.num_steps=200",
        "midtrain.num_steps=100",
        "rl.num_steps=60",
        "pretrain.save_every=10",
    )
    path = write_toml(tmp_path / "study.toml", study_tables(*overrides))
    plan = plan_study(study_config(*overrides), tmp_path / "out")
    arguments: list[str | Path] = ["study", path, "--out", tmp_path / "out"]
    moments: list[Callable[[], bool]] = [
        lambda: num_records(find_run(plan, "pretrain sharp s0").directory) > 20,
        lambda: num_records(find_run(plan, "midtrain ce s0").directory) > 5,
        lambda: num_records(find_run(plan, "rl sharp s0").directory) > 5,
    ]
    done: dict[str, int] = {}
    for moment in moments:
        group = kill_after(arguments, tmp_path, moment, random.uniform(0, 0.3))
        wait_until(lambda group=group: not living_processes(group))
        assert done.items() <= done_runs(plan).items(), "a finished run was made again"
        done = done_runs(plan)
    assert 0 < len(done) < len(plan)
    finished = run_cli(*arguments, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    for planned in plan:
        assert f"{planned.label} done" in finished.stdout or planned.label in done
    assert done.items() <= done_runs(plan).items()
    for one, other in zip(plan, plan_study(study_config(*overrides), tmp_path / "whole"), strict=True):
        execute(other)
        if one.stage == "evaluate":
            assert (one.directory / "results.jsonl").read_bytes() == (
                other.directory / "results.jsonl"
            ).read_bytes()
        elif one.stage != "data":
            assert outcome(one.directory) == outcome(other.directory), one.label


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGINT, "the whole group, as a terminal does"),
        (signal.SIGINT, "the study alone"),
        (signal.SIGTERM, "the study alone"),
    ],
)
@pytest.mark.parametrize("moment", ["while processes start", "in the middle of a run"])
def test_a_signal_stops_a_study_in_one_line(tmp_path: Path, number: int, whom: str, moment: str) -> None:
    overrides = ("pretrain.num_steps=100000", "pretrain.eval_every=0")
    path = write_toml(tmp_path / "study.toml", study_tables(*overrides))
    plan = plan_study(study_config(*overrides), tmp_path / "out")
    runs = [find_run(plan, f"pretrain {arm} s0").directory for arm in ("ce", "sharp")]
    process = start(["study", path, "--out", tmp_path / "out"], tmp_path)
    try:
        if moment == "while processes start":
            wait_until(lambda: plan[0].is_done, process)  # then the second process starts
        else:
            wait_until(lambda: all(num_records(run) > 5 for run in runs), process)
        if whom == "the study alone":
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else 0)
    assert error.strip() == "rlprior: stopped; the same command goes on from the last checkpoint"
    wait_until(lambda: not living_processes(process.pid))


@pytest.mark.parametrize("stage", ["train", pytest.param("rl", marks=pytest.mark.slow)])
def test_a_terminated_run_saves_says_how_to_go_on_and_ends_with_0(stage: str, tmp_path: Path) -> None:
    if stage == "train":
        whole, stopped = train_command(tmp_path, num_steps=150)
    else:
        policy = train_small_model(tmp_path)
        tables = rl_tables("rl.num_steps=40", "rl.save_every=40")
        path = write_toml(tmp_path / "rl.toml", tables)
        common: list[str | Path] = ["rl", path, "--init-from", last_checkpoint(policy)]
        whole, stopped = [*common, "--out", tmp_path / "whole"], [*common, "--out", tmp_path / "killed"]
    assert main([str(argument) for argument in whole]) == 0
    process = start(stopped, tmp_path)
    try:
        wait_until(lambda: num_records(tmp_path / "killed") > 2, process)
        process.terminate()
        _, message = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0
    last = list_checkpoints(tmp_path / "killed")[-1].step
    assert f"rlprior: stopped after step {last} of " in message
    assert "which is saved; the same command goes on from there" in message
    assert num_records(tmp_path / "killed") <= last
    assert not (tmp_path / "killed" / "result.json").exists()
    assert main([str(argument) for argument in stopped]) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
