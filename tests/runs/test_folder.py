"""Run directories: who may write them, what they keep, and what a kill or a full disk leaves."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.small_disk import fill, small_disk

from rlprior.config import RunError, UsageError
from rlprior.runs.files import disk_errors, read_jsonl, write_atomically
from rlprior.runs.folder import Progress, Run, read_progress, session_seconds
from rlprior.runs.identity import RunIdentity, identify, input_identity


@dataclass(frozen=True, kw_only=True)
class Settings:
    corpus: str = "/somewhere/corpus"
    num_steps: int = 4
    rate: float = 0.5


CODE = ("rlprior.seeding",)


def open_run(directory: Path, settings: Settings | None = None, corpus: str = "c0ffee") -> Run:
    settings = settings or Settings()
    return Run(directory, identify("train", settings, code=CODE, inputs={"corpus": corpus}), settings)


# the directory


def test_the_directory_says_what_made_it(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "train-1"
    with open_run(directory) as run:
        assert run.result is None
        run.finish({"checkpoint": "there", "score": 0.1})
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["id"] == run.identity.id
    assert manifest["config"] == {"num_steps": 4, "rate": 0.5}
    assert manifest["inputs"] == {"corpus": "c0ffee"}
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert manifest["hardware"]["cores"] == os.cpu_count()
    assert tomllib.loads((directory / "config.toml").read_text()) == dataclasses.asdict(Settings())
    assert open_run(directory).result == {"checkpoint": "there", "score": 0.1}


def test_the_identity_of_what_a_finished_run_made_is_the_run(tmp_path: Path) -> None:
    directory = tmp_path / "train-1"
    with open_run(directory) as run:
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / "weights").write_text("w")
        unfinished = input_identity(directory / "checkpoints")
        run.finish({})
    assert run.identity.id not in unfinished  # it may still change: its bytes are what it is
    assert input_identity(directory / "checkpoints") == f"{run.identity.id}/checkpoints"
    assert input_identity(directory) == f"{run.identity.id}/."
    moved = directory.rename(tmp_path / "elsewhere")
    assert input_identity(moved / "checkpoints" / "weights") == f"{run.identity.id}/checkpoints/weights"


def test_opening_again_changes_nothing_of_what_determines_it(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        pass
    names = ("manifest.json", "config.toml")
    before = [(tmp_path / "run" / name).stat().st_mtime_ns for name in names]
    # the corpus has moved: the same run
    with open_run(tmp_path / "run", Settings(corpus="/moved")):
        pass
    assert [(tmp_path / "run" / name).stat().st_mtime_ns for name in names] == before


@pytest.mark.parametrize(
    ("settings", "corpus", "different"),
    [
        (Settings(num_steps=5), "c0ffee", "config.num_steps"),
        (Settings(num_steps=5, rate=0.25), "c0ffee", "config.num_steps, config.rate"),
        (Settings(), "decaf", "inputs.corpus"),
        (Settings(rate=1), "c0ffee", "config.rate"),
    ],
)
def test_the_directory_of_another_run_is_refused(
    settings: Settings, corpus: str, different: str, tmp_path: Path
) -> None:
    with open_run(tmp_path / "run", Settings(rate=1.0) if settings.rate == 1 else None):
        pass
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError) as error, open_run(tmp_path / "run", settings, corpus):
        pass
    assert str(error.value) == (
        f"{tmp_path / 'run'}: holds another run (it differs in {different}); choose another --out, or delete "
        "that directory"
    )
    assert sorted(tmp_path.rglob("*")) == before
    with open_run(tmp_path / "run", Settings(rate=1.0) if settings.rate == 1 else None):
        pass  # the refused one has let go of the lock


def test_other_code_is_another_run(tmp_path: Path) -> None:
    with open_run(tmp_path):
        pass
    other = identify("train", Settings(), code=("rlprior.config",), inputs={"corpus": "c0ffee"})
    with pytest.raises(UsageError, match=r"it differs in code\)"), Run(tmp_path, other, Settings()):
        pass


def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlprior.config import UsageError\n"
        "from rlprior.runs.folder import Run\nfrom rlprior.runs.identity import RunIdentity\n"
        "identity = RunIdentity(stage='train', config={}, inputs={}, code='')\n"
        "try:\n"
        "    Run(Path(sys.argv[1]), identity, {}).__enter__(); print('opened')\n"
        "except UsageError as error:\n"
        "    print(error)\n"
    )

    def second() -> str:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with Run(tmp_path, RunIdentity(stage="train", config={}, inputs={}, code=""), {}):
        assert second() == f"{tmp_path}: another process is writing this run; wait for it or end it"
    assert second() == "opened"


def test_whoever_waited_for_the_lock_meets_the_owner_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is empty when the second run looks at it first, and belongs to another when it gets the lock."""
    flock = fcntl.flock

    def flock_late(file: Any, operation: int) -> None:
        monkeypatch.undo()
        with open_run(tmp_path):
            pass
        flock(file, operation)

    late = open_run(tmp_path, Settings(num_steps=9))
    monkeypatch.setattr(fcntl, "flock", flock_late)
    with pytest.raises(UsageError, match=r"holds another run \(it differs in config\.num_steps\)"), late:
        pass


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_a_file_in_the_way_is_one_clear_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    directory = tmp_path / "file" if place == "a file" else tmp_path / "file" / "run"
    with pytest.raises(RunError, match="a file stands where a folder has to be"), open_run(directory):
        pass
    assert (tmp_path / "file").read_text() == "precious"


# metrics


def test_records_later_than_the_step_resumed_from_are_dropped(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.resume_metrics(0)
        for step in range(1, 5):
            run.log({"step": step, "loss": 1 / step}, timing={"seconds": 0.1 * step})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with open_run(tmp_path) as run:
        run.resume_metrics(2)
        assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
        assert [record["step"] for record in read_jsonl(tmp_path / "timing.jsonl")] == [1, 2]
        for step in range(3, 5):
            run.log({"step": step, "loss": 1 / step})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert [record["step"] for record in read_jsonl(tmp_path / "timing.jsonl")] == [1, 2]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]
    # a whole record without its line end may have lost digits of its last number
    path.write_text('{"step": 1}\n{"step": 23}')
    assert [record["step"] for record in read_jsonl(path)] == [1]
    with open_run(tmp_path) as run:
        run.resume_metrics(9)
        run.log({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_record_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(RuntimeError, match="resume_metrics"):
            run.log({"step": 1})
        run.resume_metrics(0)
        run.log({"step": 1, "loss": float("nan")}, timing={"seconds": 1.0})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": NaN}\n'
        assert (tmp_path / "timing.jsonl").read_text() == '{"step": 1, "seconds": 1.0}\n'


# progress and time


def test_progress_reaches_whoever_watches(tmp_path: Path) -> None:
    shown: list[Progress] = []
    assert read_progress(tmp_path) is None
    with open_run(tmp_path) as run:
        run.on_progress = shown.append
        run.progress(1, 100, unit="steps", rate=2.0, note="loss 3")
        run.progress(2, 100, unit="steps")  # within half a second of the first
        assert read_progress(tmp_path) == Progress(done=1, total=100, unit="steps", rate=2.0, note="loss 3")
        run.progress(100, 100, unit="steps")  # the end is always shown
    assert [progress.done for progress in shown] == [1, 100]
    assert read_progress(tmp_path) == shown[-1]


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", '{"done": 1}'])
def test_progress_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert read_progress(tmp_path) is None


def test_seconds_add_up_over_sessions_and_survive_a_torn_line(tmp_path: Path) -> None:
    assert session_seconds(tmp_path) == 0
    with open_run(tmp_path):
        pass
    first = session_seconds(tmp_path)
    assert first > 0
    with (tmp_path / "sessions.jsonl").open("a") as file:
        file.write('{"seco')
    with open_run(tmp_path):
        pass
    assert len(read_jsonl(tmp_path / "sessions.jsonl")) == 2
    assert session_seconds(tmp_path) > first


# full disks and kills


@pytest.mark.parametrize("operation", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_debris(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if operation == "write":
        monkeypatch.setattr(Path, "open", full)
    elif operation == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError) as error:
        write_atomically(path, "new")
    monkeypatch.undo()
    assert str(error.value) == (
        f"{path}: the disk is full; free some space and run the same command again, it goes on from the last checkpoint"
    )
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_an_interrupt_leaves_the_old_file_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_what_a_kill_left_beside_a_file_goes_at_the_next_start(tmp_path: Path) -> None:
    with open_run(tmp_path):
        pass
    (tmp_path / ".manifest.json.12345").write_text("half")
    with open_run(tmp_path):
        pass
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk quota is used up; free some space"),
        (errno.EROFS, "the disk is read-only; choose another --out"),
        (errno.EACCES, "no permission to write there; choose another --out"),
    ],
)
def test_each_reason_a_disk_refuses_has_its_line(number: int, reason: str) -> None:
    with pytest.raises(RunError) as error, disk_errors(Path("/there")):
        raise OSError(number, os.strerror(number))
    assert str(error.value).startswith(f"/there: {reason}")


def test_other_errors_of_the_system_pass_through() -> None:
    with pytest.raises(FileNotFoundError), disk_errors(Path("/there")):
        raise FileNotFoundError(errno.ENOENT, "gone")


def log_many(run: Run, steps: range) -> None:
    for step in steps:
        run.log({"step": step, "padding": "x" * 64})


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_the_run_goes_on_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        run = open_run(disk / "run")
        with run:
            run.resume_metrics(0)
            run.log({"step": 1})
            ballast = fill(disk)
            with pytest.raises(RunError, match=r"metrics\.jsonl: the disk is full"):
                log_many(run, range(2, 4000))
            manifest = (disk / "run" / "manifest.json").read_bytes()
            with pytest.raises(RunError, match=r"result\.json: the disk is full"):
                run.finish({"padding": "x" * 5000})
        assert run.result is None
        assert (disk / "run" / "manifest.json").read_bytes() == manifest
        ballast.unlink()
        with open_run(disk / "run") as again:
            again.resume_metrics(1)
            again.log({"step": 2})
            again.finish({})
        assert read_jsonl(disk / "run" / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
        assert session_seconds(disk / "run") > 0
