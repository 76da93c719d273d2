"""Runs programs that nobody trusts, each in a process of its own that has walled itself in before it is given the program."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from rlprior.config import RunError
from rlprior.tasks.code.isolation import REQUIRED_WALLS
from rlprior.tasks.problem import Status

T = TypeVar("T")
U = TypeVar("U")

MAX_START_SECONDS = 60.0
MAX_MEMORY_BYTES = 2 << 30
"""Address space of a program, the interpreter's included: one reference solution of MBPP+ needs more than half of it."""
MAX_RESULT_BYTES = 4 << 20
"""Of what the calls of a program return, as JSON: all outputs of a problem of HumanEval+ or MBPP+ fit."""
GRACE_SECONDS = 10.0
"""Of the clock, beyond twice the processor time: programs share the processors."""
_NOTICE_SECONDS = 0.5
"""Until the threads of an interrupted call notice."""
_PACKAGE = "rlprior/tasks/code"
_HARNESS = ("child.py", "isolation.py", "seccomp.py", "values.py")
# What -I does where the environment is empty, but for the seed: the order of a set is the same in every process.
_OPTIONS = ("-P", "-s", "-S", "-B")
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
_COMMAND = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from rlprior.tasks.code.child import main; main()"
)

_LIBRARIES = {
    Path(os.__file__).resolve().parent,
    *(Path(sys.base_prefix, "lib"), Path(sys.base_exec_prefix, "lib")),
}
_READABLE = (
    # the interpreter's own modules and the shared libraries that they load
    *sorted(str(path) for path in _LIBRARIES),
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"),
    *("/usr/share/zoneinfo", "/dev/null", "/dev/urandom"),
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A program and the calls to make.

    Attributes:
        sources: (head, body) pairs, of which the first that defines `entry_point` is run; see `child.choose_program`.
        entry_point: the function that the program must define.
        inputs: for each call its arguments, as one encoded list.
        epilogue: code run after the program, before the calls.
        call: the function that is called, `entry_point` if None.
        max_cpu_seconds: of the program and all its calls; on the clock it may take twice that and `GRACE_SECONDS`.
    """

    sources: tuple[tuple[str, str], ...]
    entry_point: str
    inputs: list[Any] = field(repr=False)
    epilogue: str = field(default="", repr=False)
    call: str | None = None
    max_cpu_seconds: int = 5


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        outputs: for each call what it returned, encoded and not to be trusted; None unless all calls returned.
        status: without outputs why: WRONG (it raised), UNPARSABLE, TIMED_OUT or FAILED (out of memory, or killed).
        detail: of the status, in a few words.
        cpu_seconds: that the program says it took; as little to be trusted.
    """

    outputs: list[Any] | None
    status: Status | None = None
    detail: str = ""
    cpu_seconds: float = 0.0


class Sandbox:
    """Runs requests in parallel; use it as a context manager.

    A program that never returns costs its time, one that fills its memory its own process. Nothing that it does reaches another.

    Args:
        num_workers: how many run at once.
        unsafe_exec: run them where the system cannot isolate them, too.
    """

    def __init__(self, *, num_workers: int = 1, unsafe_exec: bool = False) -> None:
        self._num_workers = num_workers
        self._unsafe_exec = unsafe_exec
        self._stopped = threading.Event()

    def __enter__(self) -> Sandbox:
        self.directory = Path(tempfile.mkdtemp(prefix="rlprior-sandbox-"))
        package = self.directory / "harness" / _PACKAGE
        package.mkdir(parents=True)
        for name in _HARNESS:
            shutil.copy(Path(__file__).with_name(name), package)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.directory)

    def map(self, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """`function`, which calls `run`, of each item, as many at once as there are workers; in order."""
        self._stopped.clear()
        with ThreadPoolExecutor(self._num_workers) as executor:
            try:
                return list(executor.map(function, items))
            except BaseException:
                self._stopped.set()
                executor.shutdown(wait=False, cancel_futures=True)
                raise

    def run(self, request: Request) -> Outcome:
        """What became of one program.

        Raises:
            RunError: the system cannot isolate it, or its process cannot be started.
        """
        with (
            tempfile.TemporaryDirectory(dir=self.directory, ignore_cleanup_errors=True) as work,
            self._start(request, work) as process,
        ):
            self._check_walls(process)
            return self._converse(process, request)

    @contextlib.contextmanager
    def _start(self, request: Request, work: str) -> Iterator[subprocess.Popen[bytes]]:
        settings = {
            "max_memory_bytes": MAX_MEMORY_BYTES,
            "max_cpu_seconds": request.max_cpu_seconds,
            "parent": os.getpid(),
            "readable": [*_READABLE, str(self.directory / "harness"), work],
        }
        process = subprocess.Popen(
            [
                sys.executable,
                *_OPTIONS,
                "-c",
                _COMMAND,
                str(self.directory / "harness"),
                json.dumps(settings),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=work,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end(process)
            for stream in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(BrokenPipeError):
                    _present(stream).close()

    def _check_walls(self, process: subprocess.Popen[bytes]) -> None:
        """Refuse to send a program to a process that is not isolated."""
        line = self._receive(process, seconds=MAX_START_SECONDS, max_bytes=1 << 16, last=b"\n")
        if isinstance(line, Status) or not line:
            _end(process)
            said = os.read(_present(process.stderr).fileno(), 1 << 16).decode(errors="replace").split("\n")
            reason = next((text for text in reversed(said) if text.strip()), "it said nothing")
            raise RunError(f"a process for running programs could not be started: {reason}")
        report = json.loads(line)
        missing = sorted(REQUIRED_WALLS.difference(report["walls"]))
        if missing and not self._unsafe_exec:
            raise RunError(
                f"programs cannot be isolated here: {report['problem'] or 'no ' + ' and no '.join(missing)}; run on Linux 5.13 or newer "
                "with Landlock and seccomp, or let untrusted programs do what you can do with --unsafe-exec"
            )

    def _converse(self, process: subprocess.Popen[bytes], request: Request) -> Outcome:
        message = {
            "sources": request.sources,
            "entry_point": request.entry_point,
            "inputs": request.inputs,
            "epilogue": request.epilogue,
            "call": request.call or request.entry_point,
        }
        with contextlib.suppress(BrokenPipeError), _present(process.stdin) as stream:
            stream.write(json.dumps(message).encode())
        seconds = 2 * request.max_cpu_seconds + GRACE_SECONDS
        data = self._receive(process, seconds=seconds, max_bytes=MAX_RESULT_BYTES)
        _end(process)
        if data is Status.TIMED_OUT or process.returncode == -signal.SIGXCPU:
            return Outcome(None, Status.TIMED_OUT, "it did not end")
        if isinstance(data, Status):
            return Outcome(None, data, "it returned too much")
        return _read_result(data, len(request.inputs), process.returncode)

    def _receive(
        self, process: subprocess.Popen[bytes], *, seconds: float, max_bytes: int, last: bytes | None = None
    ) -> bytes | Status:
        """What it writes up to its end, or to the byte `last`; TIMED_OUT or FAILED where it takes too long or says too much."""
        descriptor, deadline = _present(process.stdout).fileno(), time.monotonic() + seconds
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        data = bytearray()
        while len(data) <= max_bytes:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or self._stopped.is_set():
                return Status.TIMED_OUT
            if not poll.poll(1000 * min(remaining, _NOTICE_SECONDS)):
                continue
            chunk = os.read(descriptor, 1 << 16)
            data += chunk
            if not chunk or chunk[-1:] == last:
                return bytes(data)
        return Status.FAILED


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill its whole group, then collect it: collected first, its number could already be another group's."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _present(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _read_result(data: bytes, num_calls: int, code: int) -> Outcome:
    """What an untrusted process wrote as its result."""
    try:
        result = json.loads(data)
    except (ValueError, RecursionError):
        result = None
    match result:
        case {"outputs": [*outputs], "cpu_seconds": float(cpu_seconds)} if len(outputs) == num_calls:
            return Outcome(outputs, cpu_seconds=cpu_seconds)
        case {"unparsable": True}:
            return Outcome(None, Status.UNPARSABLE, "no program that defines the function")
        case {"raised": "MemoryError"}:
            return Outcome(None, Status.FAILED, "out of memory")
        case {"raised": str(name)}:
            return Outcome(None, Status.WRONG, f"raised {name[:80]}")
    return Outcome(None, Status.FAILED, f"ended without a result, with code {code}")
