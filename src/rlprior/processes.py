"""Pools of processes that end with the one that opened them, and that leave Ctrl-C to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor


@contextlib.contextmanager
def open_pool(num_workers: int, num_threads: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, and at once where it is interrupted: a run can be killed anywhere.

    Args:
        num_workers: how many; they are started by `submit`, which belongs inside `started_without_interrupts`.
        num_threads: torch threads of each.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (num_threads, os.getpid())) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
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


def _start_worker(num_threads: int, parent: int) -> None:
    """Set the threads, and end with the parent: a killed run leaves no process behind that would hold its files."""
    import torch

    torch.set_num_threads(num_threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
