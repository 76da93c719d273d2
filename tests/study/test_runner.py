"""Executing a plan: only what is missing, the longest way first, failures in one line, nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tests.small_study import find_run, study_config

from rlprior import processes
from rlprior.config import RunError, UsageError
from rlprior.runs.folder import read_progress
from rlprior.study import runner
from rlprior.study.plan import PlannedRun, plan_study
from rlprior.study.results import load_study
from rlprior.study.runner import execute_plan, stage_seconds, write_study_file

ONE_ARM = "arms={ce={label='ce', objective={name='cross_entropy'}}}"


class Inline:
    """A pool that does the work at once, in this process."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Callable[[PlannedRun], Path], planned: PlannedRun) -> Future[Path]:
        future: Future[Path] = Future()
        try:
            future.set_result(function(planned))
        except Exception as error:
            future.set_exception(error)
        return future


def finish(planned: PlannedRun) -> Path:
    """What is left of a run that is done."""
    planned.directory.mkdir(parents=True, exist_ok=True)
    (planned.directory / "manifest.json").write_text(json.dumps({"id": planned.identity.id}))
    (planned.directory / "result.json").write_text("{}")
    return planned.directory


def pretend(monkeypatch: pytest.MonkeyPatch, errors: dict[str, Exception] | None = None) -> list[str]:
    """Have runs executed by `finish`, those in `errors` fail; the labels in the order of execution."""
    executed: list[str] = []

    def execute(planned: PlannedRun, *, track: Sequence[str]) -> Path:
        executed.append(planned.label)
        if errors and planned.label in errors:
            raise errors[planned.label]
        return finish(planned)

    monkeypatch.setattr(processes, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(runner, "execute", execute)
    return executed


def make_all(plan: Sequence[PlannedRun], *, num_workers: int = 1, **hooks: Any) -> list[str]:
    """Execute; the labels of the runs that were finished."""
    finished: list[str] = []
    execute_plan(
        plan,
        num_workers=num_workers,
        threads_per_worker=1,
        on_change=hooks.get("on_change", lambda running, pending: None),
        on_finish=lambda planned: finished.append(planned.label),
    )
    return finished


def test_every_run_is_made_once_after_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed = pretend(monkeypatch)
    plan = plan_study(study_config("seeds=[0,1]"), tmp_path)
    finished = make_all(plan, num_workers=2)
    assert sorted(finished) == sorted(executed) == sorted(planned.label for planned in plan)
    place = {find_run(plan, label).directory: number for number, label in enumerate(executed)}
    for planned in plan:
        assert all(place[needed] < place[planned.directory] for needed in planned.needs)


def test_only_missing_runs_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed = pretend(monkeypatch)
    plan = plan_study(study_config(), tmp_path)
    make_all(plan)
    executed.clear()
    assert make_all(plan) == executed == []
    shutil.rmtree(find_run(plan, "rl ce s0").directory)
    assert make_all(plan) == executed == ["rl ce s0"]
    changed = plan_study(study_config("arms.sharp.objective.beta=-0.3"), tmp_path)
    executed.clear()
    make_all(changed)
    assert sorted(executed) == sorted(p.label for p in changed if p.arm == "sharp")


def longest_way(plan: Sequence[PlannedRun], planned: PlannedRun) -> float:
    """Cost of a run and of the costliest chain that waits for it."""
    waiting = [other for other in plan if planned.directory in other.needs]
    return planned.cost + max((longest_way(plan, other) for other in waiting), default=0.0)


def test_the_run_on_the_longest_way_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed = pretend(monkeypatch)
    plan = plan_study(study_config("seeds=[0,1]"), tmp_path)
    make_all(plan)
    done: set[Path] = set()
    num_choices = 0
    for label in executed:
        chosen = find_run(plan, label)
        ready = [p for p in plan if p.directory not in done and done.issuperset(p.needs)]
        num_choices += len({longest_way(plan, one) for one in ready}) > 1
        assert longest_way(plan, chosen) == max(longest_way(plan, one) for one in ready)
        done.add(chosen.directory)
    assert num_choices > 5, "there was nothing to choose"


def test_never_more_runs_than_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)

    num_running: list[int] = []

    def wait_for_one(_: processes.Pool, running: dict[Future[Path], PlannedRun]) -> set[Future[Path]]:
        """The other runs take longer."""
        num_running.append(len(running))
        return {next(iter(running))}

    monkeypatch.setattr(processes.Pool, "wait", wait_for_one)
    plan = plan_study(study_config("seeds=[0,1,2]"), tmp_path)
    assert len(make_all(plan, num_workers=3)) == len(plan)
    assert max(num_running) == 3
    assert num_running.count(3) > len(plan) / 2, "workers stood idle"


@pytest.mark.parametrize("kind", [RunError, UsageError])
def test_a_failure_stops_what_needs_it_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    executed = pretend(monkeypatch, {"midtrain sharp s0": kind("the disk is full")})
    plan = plan_study(study_config(), tmp_path)
    with pytest.raises(kind, match=r"^midtrain sharp s0: the disk is full \(1 failed, 3 not made\)$"):
        make_all(plan)
    waiting = {"evaluate midtrain sharp s0", "rl sharp s0", "evaluate rl sharp s0"}
    assert set(executed) == {planned.label for planned in plan} - waiting
    assert not find_run(plan, "midtrain sharp s0").is_done


def test_of_several_failures_the_first_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: dict[str, Exception] = {f"pretrain {arm} s0": RunError(arm) for arm in ("ce", "sharp")}
    pretend(monkeypatch, errors)
    with pytest.raises(RunError, match=r"^pretrain (ce|sharp) s0: \1 \(2 failed, 10 not made\)$"):
        make_all(plan_study(study_config(), tmp_path))


def test_a_mistake_of_the_program_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug must not look like a user's mistake: it keeps its type and its traceback."""
    pretend(monkeypatch, {"data": ZeroDivisionError("a bug")})
    with pytest.raises(ZeroDivisionError, match="a bug"):
        make_all(plan_study(study_config(), tmp_path))


def test_processes_go_on_after_a_failure_and_make_only_what_is_missing(tmp_path: Path) -> None:
    """With real processes: one arm's folder is in the way, the other arm is finished; then the rest alone is made."""
    config = study_config()
    plan = plan_study(config, tmp_path)
    in_the_way = find_run(plan, "pretrain sharp s0").directory
    in_the_way.mkdir(parents=True)
    (in_the_way / "manifest.json").write_text(json.dumps({"id": "0", "stage": "rl", "code": "other"}))
    with pytest.raises(
        UsageError, match=r"pretrain sharp s0: .*holds another run .* \(1 failed, 5 not made\)$"
    ):
        make_all(plan, num_workers=2)
    first = {planned.label for planned in plan if planned.is_done}
    assert first == {planned.label for planned in plan if planned.arm != "sharp"}
    stamps = {
        planned.directory: (planned.directory / "result.json").stat().st_mtime_ns
        for planned in plan
        if planned.is_done
    }
    shutil.rmtree(in_the_way)
    assert set(make_all(plan, num_workers=2)) == {planned.label for planned in plan if planned.arm == "sharp"}
    for directory, stamp in stamps.items():
        assert (directory / "result.json").stat().st_mtime_ns == stamp
    write_study_file(config, tmp_path, plan, command="")
    assert load_study(tmp_path).missing == ()


@pytest.mark.parametrize("which", ["a worker that trains", "a worker that has yet to take its run"])
def test_a_killed_worker_ends_the_study_in_one_line(tmp_path: Path, which: str) -> None:
    """As the kernel does when memory runs out. The other worker saves and ends: it takes no run that is left in the queue."""
    plan = plan_study(study_config("pretrain.num_steps=100000", "pretrain.eval_every=0"), tmp_path)
    deadline = time.monotonic() + 120
    frozen: list[int] = []
    killed: list[int] = []

    def kill_when_training(running: Sequence[PlannedRun], pending: Sequence[PlannedRun]) -> None:
        assert time.monotonic() < deadline
        workers = multiprocessing.active_children()
        if which != "a worker that trains" and len(workers) == 2 and not frozen:
            frozen.append(max(worker.pid or 0 for worker in workers))
            os.kill(frozen[0], signal.SIGSTOP)
        if not killed and any(run.stage == "pretrain" and read_progress(run.directory) for run in running):
            killed.append(frozen[0] if frozen else workers[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(
        RunError, match=r"pretrain .*: the process was killed.*run the same command again"
    ) as raised:
        make_all(plan, num_workers=2, on_change=kill_when_training)
    assert "\n" not in str(raised.value)
    assert multiprocessing.active_children() == []
    assert [planned.label for planned in plan if planned.is_done] == ["data"]
    started = [planned.label for planned in plan if (planned.directory / "metrics.jsonl").exists()]
    assert len(started) == 1 or which == "a worker that trains"


def test_study_file_and_times(tmp_path: Path) -> None:
    config = study_config(ONE_ARM)
    plan = plan_study(config, tmp_path)
    for number, planned in enumerate(plan, start=1):
        finish(planned)
        (planned.directory / "sessions.jsonl").write_text(f'{{"seconds": {number}}}\n{{"seconds": 0.5}}\n')
    assert stage_seconds(plan) == {
        "data": 1.5,
        "pretrain": 2.5,
        "evaluate": 3.5 + 5.5 + 7.5,
        "midtrain": 4.5,
        "rl": 6.5,
    }
    write_study_file(config, tmp_path, plan, command="rlprior study x.toml", notes=["n"])
    study = json.loads((tmp_path / "study.json").read_text())
    assert study["command"] == "rlprior study x.toml"
    assert study["wall_seconds"] == stage_seconds(plan)
    assert [(run["arm"], run["seed"], run["stage"]) for run in study["runs"]] == [
        ("ce", 0, stage) for stage in ("pretrain", "midtrain", "rl")
    ]
    for run in study["runs"]:
        for key in ("directory", "evaluation"):
            assert not Path(run[key]).is_absolute()
            assert (tmp_path / run[key] / "result.json").exists()
