"""A disk that fills up at any moment: one line says so, nothing is half-written, and the same command goes on to the same bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.small_disk import fill, small_disk
from tests.small_study import outcome, study_config, train_tables, write_toml

from rlprior.cli import main
from rlprior.config import RunError
from rlprior.study.plan import PlannedRun, plan_study
from rlprior.study.runner import execute

CONFIG = study_config("arms={ce={label='ce', objective={name='cross_entropy'}}}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed")
    assert (
        main(["train", str(write_toml(root / "train.toml", train_tables())), "--out", str(root / "run")]) == 0
    )
    return outcome(root / "run")


def half_written(directory: Path) -> list[str]:
    """Files and folders that exist only while something is being written."""
    return [path.name for path in directory.rglob(".*")]


# 40: not even the corpus fits. 200: the corpus, no checkpoint. 700: two checkpoints of four.
@pytest.mark.parametrize("num_kib", [40, 200, 700])
def test_training_on_a_small_disk(
    tmp_path: Path, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str], num_kib: int
) -> None:
    path = write_toml(tmp_path / "train.toml", train_tables())
    with small_disk(tmp_path / "disk", 4000) as disk:
        ballast = fill(disk, leave_kib=num_kib)
        arguments = ["train", str(path), "--out", str(disk / "run")]
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"rlprior: {disk}/")
        assert "the disk is full; free some space and run the same command again" in error
        assert error.count("\n") == 1
        assert half_written(disk) == []
        ballast.unlink()
        assert main(arguments) == 0
        assert outcome(disk / "run") == undisturbed


def failing_fsync(number: int) -> tuple[Callable[[int], None], list[int]]:
    """`os.fsync` that finds the disk full from the call of that number on (0: never); the calls so far."""
    calls: list[int] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if 0 < number <= len(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    return fsync, calls


def make_stages(plan: list[PlannedRun]) -> None:
    for planned in plan:
        execute(planned)


def attempt(plan: list[PlannedRun]) -> str | None:
    """Go on with the stages; what stopped them, or None where they are finished."""
    try:
        make_stages(plan)
    except RunError as error:
        return str(error)
    return None


def outcomes(plan: list[PlannedRun]) -> dict[str, bytes | dict[str, bytes]]:
    found: dict[str, bytes | dict[str, bytes]] = {}
    for planned in plan[1:]:
        if planned.stage == "evaluate":
            found[planned.label] = (planned.directory / "results.jsonl").read_bytes()
        else:
            found[planned.label] = outcome(planned.directory)
    return found


def test_every_stage_survives_a_full_disk_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan_study(CONFIG, tmp_path / "whole")
    with monkeypatch.context() as patch:
        count, calls = failing_fsync(0)
        patch.setattr(os, "fsync", count)
        make_stages(whole)
    expected = outcomes(whole)
    assert len(calls) > 50
    plan = plan_study(CONFIG, tmp_path / "full")
    num_failures = 0
    while not plan[-1].is_done:
        # each attempt gets a little further than the one before, and fails at another place
        fsync, _ = failing_fsync(3 * (num_failures + 1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            message = attempt(plan)
        assert message is None or "the disk is full" in message
        assert half_written(tmp_path / "full") == []
        num_failures += message is not None
    assert num_failures >= 5
    assert outcomes(plan) == expected
