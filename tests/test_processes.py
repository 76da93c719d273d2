"""Pools of processes: who sees Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from rlprior.processes import started_without_interrupts


def test_ctrl_c_while_a_process_starts_is_kept_for_the_end_and_never_reaches_it() -> None:
    """Lost, it would leave a study running that a person has stopped."""
    children: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with started_without_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))

    with pytest.raises(KeyboardInterrupt):
        start()
    [child] = children
    try:
        child.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
    finally:
        child.kill()
        child.wait()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_where_ctrl_c_was_blocked_it_stays_blocked() -> None:
    """A worker that opens a pool of its own is still ended by the process that a person talks to."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with started_without_interrupts():
            pass
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_process_ends_with_its_code_and_all_that_it_said(world_size: str) -> None:
    """Of several, without Python's clearing up, whose buffers would be lost."""
    script = "from rlprior.world import end_process; print('all', end=''); end_process(3)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "WORLD_SIZE": world_size},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "all")
