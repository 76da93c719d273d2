"""Pools of processes that end with the one that opened them, and that leave Ctrl-C to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T = TypeVar("T")


class Pool:
    """Worker processes, started as work comes, whose death is always noticed.

    The executor alone misses that of a worker which it started after it last began to wait.
    """

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor
        self._workers: set[BaseProcess] = set()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have a worker call `function`."""
        before = set(multiprocessing.active_children())
        with started_without_interrupts():
            future = self._executor.submit(function, *arguments)
        self._workers.update(set(multiprocessing.active_children()) - before)
        return future

    def wait(self, futures: Iterable[Future[T]]) -> set[Future[T]]:
        """Those of `futures` that are done, after half a second at most if none is.

        Raises:
            BrokenProcessPool: a worker was killed. The pool takes no more work.
        """
        done, _ = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            if isinstance(error := future.exception(), BrokenProcessPool):
                raise error
        if not all(worker.is_alive() for worker in self._workers):
            raise BrokenProcessPool
        return done

    def terminate(self) -> None:
        """Send SIGTERM to the workers."""
        for worker in self._workers:
            worker.terminate()


@contextlib.contextmanager
def open_pool(num_workers: int, num_threads: int) -> Iterator[Pool]:
    """Processes that end with this one, and at once where it is interrupted or one of them is killed: a run can be killed anywhere.

    Args:
        num_workers: how many.
        num_threads: torch threads of each.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (num_threads, os.getpid())) as executor:
        pool = Pool(executor)
        try:
            yield pool
        except (KeyboardInterrupt, BrokenProcessPool):
            pool.terminate()
            raise


@contextlib.contextmanager
def started_without_interrupts() -> Iterator[None]:
    """Processes that start inside never see Ctrl-C: the one that a person talks to ends them.

    A Ctrl-C that comes meanwhile is raised at the end: a process inherits a blocked signal, not a handler, and
    whichever thread takes the signal, the handler only notes it.
    """
    interrupts: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # in such a process itself, Ctrl-C stays blocked
        signal.signal(signal.SIGINT, former)
        if interrupts:
            raise KeyboardInterrupt


def end_with_parent(parent: int) -> None:
    """End this process soon after the process `parent`, which started it: a killed run leaves none behind that would hold its files."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start_worker(num_threads: int, parent: int) -> None:
    import torch

    torch.set_num_threads(num_threads)
    end_with_parent(parent)
