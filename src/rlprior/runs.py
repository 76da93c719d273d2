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
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import tomli_w

from rlprior.config import RunError, UsageError, differing_keys, encode, fingerprint
from rlprior.tracking import TrackedRun, Trackers
from rlprior.world import ALONE, World

MAX_LOCK_ATTEMPTS = 5
_AGAIN = "free some space and run the same command again, it goes on from the last checkpoint"
_ELSEWHERE = "choose another --out"
_DISK_ERRORS = {
    errno.ENOSPC: f"the disk is full; {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; {_AGAIN}",
    errno.EROFS: f"the disk is read-only; {_ELSEWHERE}",
    errno.EACCES: f"no permission to write there; {_ELSEWHERE}",
    errno.EPERM: f"no permission to write there; {_ELSEWHERE}",
    errno.EEXIST: f"a file stands where a folder has to be; {_ELSEWHERE}",
    errno.ENOTDIR: f"a file stands where a folder has to be; {_ELSEWHERE}",
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk that is full or may not be written into one line that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunError(f"{path}: {_DISK_ERRORS[error.errno]}") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; it takes the place of `path` at the end, and is gone where that fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path):
        try:
            yield aside
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it to disk, and rename it over: a reader sees the old file or the new one."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file that only this package writes; a line torn by a kill can only be the last and is dropped."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    lines = path.read_bytes().split(b"\n")
    for line in lines[:-1]:
        records.append(json.loads(line))
    return records


def _write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def code_fingerprint(packages: Sequence[str]) -> str:
    """Hash of the Python sources of packages or modules: the part of the code that computes a stage."""
    digest = hashlib.sha256()
    for package in sorted(packages):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f"{package} is not an importable module")
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            digest.update(f"{package}/{file.relative_to(origin.parent).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_identity(path: Path) -> str:
    """What an input is, whatever its path: the id of the run it belongs to, or else the hash of its bytes, with the
    name of a file and the names inside a folder.

    Raises:
        UsageError: there is nothing at `path`.
    """
    path = path.resolve()
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")
    for parent in (path, *path.parents):
        if (parent / "manifest.json").exists() and (parent / "result.json").exists():
            run_id = json.loads((parent / "manifest.json").read_text())["id"]
            return f"{run_id}/{path.relative_to(parent).as_posix()}"
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    hashes = [
        f"{file.relative_to(path).as_posix() if path.is_dir() else path.name}:{file_hash(file)}"
        for file in files
    ]
    return fingerprint(hashes)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What determines a run: its stage, its config, the identity of each input, and the code of the stage.

    `inputs` names config fields that hold paths; their identity stands in for the path, so that a moved folder is the same run.
    """

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    code: str

    @property
    def id(self) -> str:
        """12 hexadecimal digits."""
        return fingerprint(self.as_data())

    def as_data(self) -> dict[str, Any]:
        """Plain data, paths left out."""
        config = {key: value for key, value in self.config.items() if key not in self.inputs}
        return {"stage": self.stage, "config": config, "inputs": dict(self.inputs), "code": self.code}


def identify(
    stage: str, config: Any, *, code: Sequence[str], inputs: Mapping[str, str] | None = None
) -> RunIdentity:
    """The identity of a run, from its config dataclass, the packages that compute it, and its inputs' identities.

    Settings marked `HOW` take no part: a run goes on on other hardware.
    """
    return RunIdentity(
        stage=stage,
        config=encode(config, with_how=False),
        inputs=inputs or {},
        code=code_fingerprint(code),
    )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: `done` of `total` units, `rate` units a second, and what else is worth a glance."""

    done: int
    total: int
    unit: str
    rate: float
    note: str


class RunStopped(Exception):
    """A run was asked to stop, and has saved what it had. Exit code 0."""

    def __init__(self, step: int, num_steps: int) -> None:
        super().__init__(step, num_steps)  # the arguments: it travels between processes

    def __str__(self) -> str:
        step, num_steps = self.args
        return (
            f"stopped after step {step} of {num_steps}, which is saved; the same command goes on from there"
        )


@contextlib.contextmanager
def catch_termination() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come is the caller's to ask inside; outside it ends the process, as ever.

    Outside the main thread the answer is always no.
    """
    came: list[None] = []  # a second signal may come in the middle of noting the first: nothing that locks
    with on_termination(lambda: came.append(None)):
        yield lambda: bool(came)


@contextlib.contextmanager
def on_termination(react: Callable[[], object]) -> Iterator[None]:
    """`react` is called where SIGTERM comes inside; only the main thread can catch signals, and in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, lambda *_: react())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


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
            _write_jsonl(path, [*read_jsonl(path), {"seconds": time.perf_counter() - self._entered}])
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
            _write_jsonl(path, records)
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


def provenance() -> dict[str, Any]:
    """Where a run is made: versions, commit of the code, hardware."""
    import numpy
    import torch
    import transformers

    import rlprior

    return {
        "versions": {
            "rlprior": rlprior.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
        "commit": _commit(),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and accelerators of this machine."""
    import torch

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_bytes": memory, "gpus": devices}


def _commit() -> str | None:
    """Commit of the code, with `+` where files have been changed since; None outside a checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__).parent
    head = subprocess.run([git, "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    dirty = subprocess.run(
        [git, "-C", here, "status", "--porcelain"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
