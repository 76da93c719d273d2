"""What the files of a run or a study say while another process writes them. Nothing here writes, and nothing imports torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlprior.config import UsageError
from rlprior.runs.folder import Progress, is_being_written, read_progress, session_seconds
from rlprior.study.estimate import format_seconds

Status = Literal["waiting", "running", "stopped", "done"]

CURVES = {
    "pretrain": "cross_entropy_nats",
    "midtrain": "cross_entropy_nats",
    "rl": "reward_mean",
    "sft": "loss",
    "dpo": "rewards/margins",
}
"""Stage -> the metric that is drawn."""
MIN_SILENCE_SECONDS = 60.0
MAX_SILENCE_SECONDS = 600.0
"""Silence that is worth a warning where a stage does not say how fast it is."""


@dataclass
class RecordFile:
    """A JSONL file that grows, or is cut and grows again; every line is read once.

    Attributes:
        last: the last record.
        steps, values: step and value of the metric `curve` in all records that have it.
    """

    path: Path
    curve: str = ""
    last: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    _offset: int = 0
    _inode: int = -1

    def update(self) -> None:
        """Read what has been added; a torn last line is left for the next time."""
        try:
            with self.path.open("rb") as file:
                self._follow(file)
        except (OSError, ValueError, KeyError, TypeError):
            return  # not there yet, or not what a run writes: there is nothing to show

    def _follow(self, file: Any) -> None:
        found = os.fstat(file.fileno())
        # a run that is gone on with puts a shorter file in the place of the old one
        if found.st_ino != self._inode or found.st_size < self._offset:
            self.last, self.steps, self.values = {}, [], []
            self._offset, self._inode = 0, found.st_ino
        file.seek(self._offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            record = json.loads(line)
            step, value = record["step"], record.get(self.curve)
            self.last = record
            if isinstance(value, int | float) and math.isfinite(value):
                self.steps.append(step)
                self.values.append(float(value))


def describe_count(progress: Progress) -> str:
    """How far, in the run's own unit.

    >>> describe_count(Progress(done=40, total=100, unit="steps", rate=1.0, note=""))
    '40 of 100 steps'
    >>> describe_count(Progress(done=150, total=300, unit="%", rate=0.0, note=""))
    '50%'
    """
    if progress.unit == "%":
        return f"{progress.done / max(1, progress.total):.0%}"
    return f"{progress.done} of {progress.total} {progress.unit}"


@dataclass
class WatchedRun:
    """One run: what is known of it without any file, and what its files say since the last `update`.

    Attributes:
        progress: None until it says how far it is.
        silence_seconds: since it last said so, or since it began.
    """

    label: str
    stage: str
    directory: Path
    status: Status = "waiting"
    progress: Progress | None = None
    silence_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.metrics = RecordFile(self.directory / "metrics.jsonl", CURVES.get(self.stage, ""))
        self.timing = RecordFile(self.directory / "timing.jsonl")

    def update(self) -> None:
        """Read the files again."""
        is_held = is_being_written(self.directory)  # first: a run that finishes now must not look stopped
        self.progress = read_progress(self.directory)
        if (self.directory / "result.json").exists():
            self.status = "done"
        elif not (self.directory / "lock").exists():
            self.status = "waiting"
        else:
            self.status = "running" if is_held else "stopped"
        self.silence_seconds = self._silence_seconds()
        self.metrics.update()
        self.timing.update()

    def _silence_seconds(self) -> float:
        # the lock too: a run that is gone on with has the progress of the process before
        return _seconds_since(self.directory / "progress.json", self.directory / "lock")

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        if self.status == "done":
            return 1.0
        return self.progress.done / max(1, self.progress.total) if self.progress else 0.0

    @property
    def seconds_left(self) -> float | None:
        """By its own rate; None where it gives none or is not running."""
        if self.status != "running" or not self.progress or not self.progress.rate:
            return None
        return max(
            0.0, (self.progress.total - self.progress.done) / self.progress.rate - self.silence_seconds
        )

    @property
    def warning(self) -> str | None:
        """What is wrong, if anything is."""
        if self.status == "stopped":
            return "not running, stopped" + (f" at {describe_count(self.progress)}" if self.progress else "")
        if self.status == "running" and self.silence_seconds > self._longest_silence():
            return (
                f"no progress for {format_seconds(self.silence_seconds)}, though its process is there; "
                "it may hang, or the machine be busy"
            )
        return None

    def _longest_silence(self) -> float:
        """Ten times what it takes from one record to the next."""
        if not self.progress or not self.progress.rate:
            return MAX_SILENCE_SECONDS
        steps = self.metrics.steps[-2:]
        interval = (steps[1] - steps[0] if len(steps) == 2 else 1) / self.progress.rate
        return max(MIN_SILENCE_SECONDS, 10 * interval)


@dataclass
class WatchedStudy:
    """All runs of a study, as its `study.json` names them.

    Attributes:
        name: title.
        command: what was typed to make it.
        runs: in the order in which they need each other.
    """

    directory: Path
    name: str
    command: str
    runs: Sequence[WatchedRun]

    def update(self) -> None:
        """Read the files again."""
        for run in self.runs:
            if run.status != "done":
                run.update()

    def with_status(self, status: Status) -> list[WatchedRun]:
        """Runs in that state."""
        return [run for run in self.runs if run.status == status]

    @property
    def silence_seconds(self) -> float:
        """Since the command was given or a run last moved."""
        files = [
            run.directory / name for run in self.runs for name in ("progress.json", "result.json", "lock")
        ]
        return _seconds_since(self.directory / "study.json", *files)

    @property
    def is_done(self) -> bool:
        """Whether every run is."""
        return len(self.with_status("done")) == len(self.runs)

    @property
    def seconds_left(self) -> float | None:
        """Rough: what is left of each stage at the mean time of its finished runs, shared by the runs in progress.

        None where nothing runs, or a stage that is left has no finished run to go by.
        """
        running, done = self.with_status("running"), self.with_status("done")
        seconds = 0.0
        for run in self.runs:
            if run.status == "done":
                continue
            known = [session_seconds(other.directory) for other in done if other.stage == run.stage]
            if not known:
                return None
            seconds += (1 - run.share) * sum(known) / len(known)
        return seconds / len(running) if running else None


def open_run_or_study(directory: Path) -> WatchedRun | WatchedStudy:
    """What `directory` holds, with its files read once.

    Raises:
        UsageError: there is nothing, or neither a run nor a study.
    """
    if not directory.is_dir():
        raise UsageError(
            f"{directory}: no such folder; give the one that --out names, it is there once the run begins"
        )
    if (directory / "study.json").exists():
        watched: WatchedRun | WatchedStudy = _open_study(directory)
    else:
        watched = _open_run(directory)
    watched.update()
    return watched


def _open_run(directory: Path) -> WatchedRun:
    path = directory / "manifest.json"
    if not path.exists() and not is_being_written(directory):
        raise UsageError(f"{directory}: neither a run nor a study; give the folder that --out named")
    stage = ""
    if path.exists():
        manifest = _read_json(path)
        if not {"id", "stage", "config"} <= manifest.keys():
            raise UsageError(f"{directory}: neither a run nor a study; give the folder that --out named")
        stage = manifest["stage"]
    return WatchedRun(label=directory.resolve().name, stage=stage, directory=directory)


def _open_study(directory: Path) -> WatchedStudy:
    path = directory / "study.json"
    study = _read_json(path)
    # the corpus is no part of the comparison, and not in the file; the newest is the one that is used
    corpora = sorted((directory / "runs").glob("data-*"), key=lambda folder: folder.stat().st_mtime)
    runs = [WatchedRun(label="data", stage="data", directory=folder) for folder in corpora[-1:]]
    try:
        for entry in study["runs"]:
            label = f"{entry['stage']} {entry['arm']} s{entry['seed']}"
            runs.append(
                WatchedRun(label=label, stage=entry["stage"], directory=directory / entry["directory"])
            )
            evaluation = directory / entry["evaluation"]
            runs.append(WatchedRun(label=f"evaluate {label}", stage="evaluate", directory=evaluation))
        return WatchedStudy(directory=directory, name=study["name"], command=study["command"], runs=runs)
    except (KeyError, TypeError):
        raise UsageError(f"{path}: not what `rlprior study` writes") from None


def _seconds_since(*files: Path) -> float:
    """Since the newest of them was written; 0 where there is none."""
    written: list[float] = []
    for file in files:
        with contextlib.suppress(OSError):
            written.append(file.stat().st_mtime)
    return max(0.0, time.time() - max(written)) if written else 0.0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{path}: cannot be read as JSON") from None
    return found if isinstance(found, dict) else {}
