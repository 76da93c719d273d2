"""SIGTERM: what a scheduler sends before it takes the machine away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


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
