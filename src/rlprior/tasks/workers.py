"""Worker processes that answer one item at a time and may be killed at any: the parent's clock is the only one that is trusted.

What a response can do to a computer algebra system or to somebody's reward function (hang with Python's lock held, fill the memory,
end the process) happens in a process of its own, and costs the item that did it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rlprior.config import RunError
from rlprior.processes import end_with_parent
from rlprior.tasks.problem import Status

MAX_GROWTH_BYTES = 1 << 30
"""Address space that a worker may take beyond what it has once it is ready."""
MAX_START_SECONDS = 60.0
MAX_FAILED_STARTS = 3

_COMMAND = "from rlprior.tasks.workers import serve; serve()"


@dataclass
class _Worker:
    """A process and what it is doing: `item` is the position of the item it works on, `deadline` when it is killed."""

    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    is_ready: bool = False
    item: int | None = None

    def send(self, message: Any) -> None:
        # what is dead already is seen when it is listened to
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> Any:
        """Its message, None where the process is dead."""
        try:
            return json.loads(self.connection.recv_bytes())
        except (OSError, EOFError):
            return None

    def kill(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class WorkerPool:
    """Processes that hold one function and apply it to items, each within a deadline. Use it as a context manager.

    They start with the first item, are replaced as soon as they die, see no Ctrl-C, and end with this process.

    Args:
        load: `module:function`; a worker calls it once with `arguments`, and what it returns with each item.
        arguments: of `load`, by name; plain data.
        num_workers: how many processes.
        timeout_seconds: how long a worker may take for an item.
    """

    def __init__(
        self, load: str, arguments: dict[str, Any], *, num_workers: int, timeout_seconds: float
    ) -> None:
        self._request = {"load": load, "arguments": arguments, "timeout_seconds": timeout_seconds}
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._workers: list[_Worker] = []
        self._num_failed_starts = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_ids(self) -> list[int]:
        """Of the workers there are."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """Kill the workers; the next `map` starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def map(self, items: Sequence[Any]) -> list[Any]:
        """What the function returns for each item (plain data, as the items are), in order.

        Instead of it `Status.TIMED_OUT` where the deadline came first, and `Status.FAILED` where the worker died.

        Raises:
            RunError: the function could not be loaded.
        """
        results: list[Any] = [None] * len(items)
        waiting, num_open = deque(range(len(items))), len(items)
        try:
            while num_open:
                while len(self._workers) < self._num_workers:
                    self._workers.append(self._start_worker())
                self._hand_out(waiting, items)
                for item, result in self._collect():
                    results[item], num_open = result, num_open - 1
        except BaseException:
            self.close()  # an answer that comes later would be taken for another item's
            raise
        return results

    def _hand_out(self, waiting: deque[int], items: Sequence[Any]) -> None:
        for position, worker in enumerate(self._workers):
            if not (waiting and worker.is_ready and worker.item is None):
                continue
            if worker.process.poll() is not None:  # it died with nothing to do
                self._replace(position)
                continue
            worker.item = waiting.popleft()
            worker.deadline = time.monotonic() + self._timeout_seconds
            worker.send(items[worker.item])

    def _collect(self) -> Iterator[tuple[int, Any]]:
        """Items that are done, after waiting for the first message or deadline."""
        pause = max(0.0, min(worker.deadline for worker in self._workers) - time.monotonic())
        connections = [worker.connection for worker in self._workers]
        readable = wait(connections, None if math.isinf(pause) else pause)
        now = time.monotonic()
        for position, worker in enumerate(self._workers):
            item = worker.item
            if worker.connection in readable:
                message = worker.receive()
                if message is None:
                    self._replace(position)
                    result = Status.FAILED
                elif not worker.is_ready:
                    self._greet(worker, message)
                    continue
                else:
                    worker.item, worker.deadline = None, math.inf
                    result = message["value"]
            elif now >= worker.deadline:
                self._replace(position)
                result = Status.TIMED_OUT
            else:
                continue
            if item is not None:
                yield item, result

    def _greet(self, worker: _Worker, message: dict[str, Any]) -> None:
        if "error" in message:
            raise RunError(message["error"])
        worker.is_ready, worker.deadline = True, math.inf
        self._num_failed_starts = 0

    def _replace(self, position: int) -> None:
        dead = self._workers[position]
        dead.kill()
        if not dead.is_ready:
            self._num_failed_starts += 1
            if self._num_failed_starts >= MAX_FAILED_STARTS:
                raise RunError(
                    f"{MAX_FAILED_STARTS} grading processes in a row ended before they were ready "
                    f"(the last with code {dead.process.returncode}), or took more than {MAX_START_SECONDS:.0f} s"
                )
        self._workers[position] = self._start_worker()

    def _start_worker(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # a session of its own: Ctrl-C is the parent's, and what the worker starts dies with it
            start_new_session=True,
            # the same order of sets in every worker: sympy's way through a problem depends on it
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"},
        )
        theirs.close()
        worker = _Worker(process, ours, deadline=time.monotonic() + MAX_START_SECONDS)
        worker.send(self._request)
        return worker


def serve() -> None:
    """Body of a worker process: load the function, say so, and answer until the other end is closed."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent)
    connection = Connection(descriptor)

    def reply(message: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(message).encode())

    request = json.loads(connection.recv_bytes())
    module, _, name = request["load"].partition(":")
    try:
        function: Callable[[Any], Any] = getattr(importlib.import_module(module), name)(
            **request["arguments"]
        )
    except RunError as error:
        reply({"error": str(error)})
        return
    _limit_resources()
    reply({"ready": True})
    while True:
        try:
            item = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        # the kernel ends what holds Python's lock when the parent is no longer there to do it
        signal.setitimer(signal.ITIMER_REAL, 2 * request["timeout_seconds"] + 1)
        try:
            value = function(item)
        except MemoryError:
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply({"value": value})


def _limit_resources() -> None:
    """Bound the address space (where the system says how much is in use: Linux) and leave no core files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_GROWTH_BYTES, hard))
