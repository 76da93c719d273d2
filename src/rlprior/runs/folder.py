"""Run directories: one folder a run, named by what determines it, safe to kill at any moment.

<label>-<id>/
  manifest.json    what determines the run (stage, config, inputs, code) and where it ran (versions, hardware)
  config.toml      the resolved config
  metrics.jsonl    one record a logged step; the same bytes whenever the same run is made
  timing.jsonl     wall-clock figures of the same steps, kept apart because they never repeat
  progress.json    how far the run is, for whoever watches
  result.json      written last: the run is complete
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import tomli_w

from rlprior.config import RunError, UsageError, differing_keys, encode
from rlprior.runs.files import disk_errors, read_jsonl, write_atomically, write_json, write_jsonl
from rlprior.runs.identity import RunIdentity
from rlprior.runs.provenance import provenance
from rlprior.tracking import TrackedRun, Trackers
from rlprior.world import ALONE, World

MAX_LOCK_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: `done` of `total` units, `rate` units a second, and what else is worth a glance."""

    done: int
    total: int
    unit: str
    rate: float
    note: str


@dataclass
class Run:
    """An open run directory. Use it as a context manager: it holds the directory's lock.

    Of several processes the first holds the lock, writes and tracks; on the others nothing is written.

    Raises:
        UsageError: the directory belongs to another run, or another process is writing it.
    """

    directory: Path
    identity: RunIdentity
    config: Any
    _lock: IO[str] | None = field(default=None, repr=False)
    _metrics: IO[str] | None = field(default=None, repr=False)
    _timing: IO[str] | None = field(default=None, repr=False)
    _last_progress: float = field(default=0.0, repr=False)
    _entered: float = field(default=0.0, repr=False)
    world: World = field(default=ALONE, repr=False)
    on_progress: Callable[[Progress], None] | None = field(default=None, repr=False)
    trackers: Trackers = field(default_factory=lambda: Trackers(()), repr=False)

    def __enter__(self) -> Run:
        self.world.on_main(self._open)
        self._entered = time.perf_counter()
        return self

    def _open(self) -> None:
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / "lock").open("w")
        try:
            self._claim()
        except BaseException:
            self._close()
            raise

    def _claim(self) -> None:
        self._take_lock()
        self._check_owner()
        for leftover in self.directory.glob(".*.[0-9]*"):
            leftover.unlink()  # of a process killed inside write_atomically
        if not (self.directory / "manifest.json").exists():
            write_atomically(self.directory / "config.toml", tomli_w.dumps(encode(self.config)))
            manifest = {"id": self.identity.id, **self.identity.as_data(), **provenance()}
            write_json(self.directory / "manifest.json", manifest)

    def _take_lock(self) -> None:
        assert self._lock is not None
        for _ in range(MAX_LOCK_ATTEMPTS):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.05)  # whoever looks with `is_being_written` holds it for an instant
        raise UsageError(f"{self.directory}: another process is writing this run; wait for it or end it")

    def _check_owner(self) -> None:
        manifest = self.directory / "manifest.json"
        if not manifest.exists():
            return
        found = json.loads(manifest.read_text())
        if found["id"] == self.identity.id:
            return
        expected = self.identity.as_data()
        different = differing_keys({key: found.get(key) for key in expected}, expected)
        raise UsageError(
            f"{self.directory}: holds another run (it differs in {', '.join(different[:4])}); choose another --out, "
            "or delete that directory"
        )

    def __exit__(self, *_: object) -> None:
        if not self.world.is_main:
            return
        path = self.directory / "sessions.jsonl"
        with contextlib.suppress(OSError, RunError):
            write_jsonl(path, [*read_jsonl(path), {"seconds": time.perf_counter() - self._entered}])
        try:
            self.trackers.close(is_finished=self.result is not None)
        finally:
            self._close()

    def _close(self) -> None:
        for file in (self._metrics, self._timing, self._lock):
            if file:
                # what a full disk left in the buffer is tried once more here; the caller knows of it already
                with contextlib.suppress(OSError):
                    file.close()
        self._metrics = self._timing = self._lock = None

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run wrote last; None while it is not finished."""
        path = self.directory / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`: from now on the run is complete."""
        self.world.on_main(lambda: write_json(self.directory / "result.json", dict(result)))

    def resume_metrics(self, last_step: int) -> None:
        """Open the metrics for appending, after dropping records later than `last_step` (the step that is resumed from)."""
        self.world.on_main(lambda: self._open_metrics(last_step))

    def _open_metrics(self, last_step: int) -> None:
        kept: dict[int, dict[str, Any]] = {}
        for name in ("metrics.jsonl", "timing.jsonl"):
            path = self.directory / name
            records = [record for record in read_jsonl(path) if record["step"] <= last_step]
            write_jsonl(path, records)
            for record in records:
                kept.setdefault(record["step"], {}).update(record)
        self._metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        self._timing = (self.directory / "timing.jsonl").open("a", encoding="utf-8")
        config = {"stage": self.identity.stage, **encode(self.config)}
        tracked = TrackedRun(
            id=self.identity.id, directory=self.directory, config=config, first_step=last_step + 1
        )
        self.trackers.open(tracked, list(kept.values()))

    def log(self, record: Mapping[str, Any], *, timing: Mapping[str, float] | None = None) -> None:
        """Append one record, which has a `step`, to the metrics, and its wall-clock figures to the timing."""
        if not self.world.is_main:
            return
        if self._metrics is None or self._timing is None:
            raise RuntimeError("resume_metrics() opens the metrics first")
        with disk_errors(self.directory / "metrics.jsonl"):
            self._metrics.write(json.dumps(dict(record)) + "\n")
            self._metrics.flush()
            if timing:
                self._timing.write(json.dumps({"step": record["step"], **timing}) + "\n")
                self._timing.flush()
        self.trackers.log({**record, **(timing or {})})

    def progress(self, done: int, total: int, *, unit: str, rate: float = 0.0, note: str = "") -> None:
        """Say how far the run is; at most twice a second reaches the disk. `rate` is in units a second."""
        now = time.monotonic()
        if not self.world.is_main:
            return
        if now - self._last_progress < 0.5 and done < total:
            return
        self._last_progress = now
        progress = Progress(done=done, total=total, unit=unit, rate=rate, note=note)
        if self.on_progress:
            self.on_progress(progress)
        aside = self.directory / ".progress"
        with disk_errors(aside):
            aside.write_text(json.dumps(dataclasses.asdict(progress)))
            aside.replace(self.directory / "progress.json")


def is_being_written(directory: Path) -> bool:
    """Whether a process has the run in `directory` open."""
    try:
        with (directory / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_progress(directory: Path) -> Progress | None:
    """How far the run in `directory` says it is."""
    try:
        return Progress(**json.loads((directory / "progress.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def session_seconds(directory: Path) -> float:
    """Wall-clock seconds that all processes have spent on a run."""
    return sum(record["seconds"] for record in read_jsonl(directory / "sessions.jsonl"))
