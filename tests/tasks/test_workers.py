"""Worker processes: what a death costs, who ends them, and who sees Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlprior.tasks.problem import Status
from rlprior.tasks.workers import MAX_GROWTH_BYTES, WorkerPool

FUNCTION = r"""
import os, signal, time

def act(prompt, response, answer):
    if prompt == "pid":
        return os.getpid()
    if prompt == "slow":
        time.sleep(0.05 * float(response))
    if prompt == "wait":
        os.write(1, b"%d\n" % os.getpid())
        time.sleep(100)
    if prompt == "hold":  # one multiplication after the other, in C and with Python's lock held
        os.write(1, b"%d\n" % os.getpid())
        return float(len(str(7 ** (10**9))))
    if prompt == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if prompt == "fill":
        return len(bytearray(int(response)))
    return float(response)
"""


@pytest.fixture
def function(tmp_path: Path) -> Path:
    (tmp_path / "act.py").write_text(FUNCTION)
    return tmp_path / "act.py"


@pytest.fixture
def pool(function: Path) -> Iterator[WorkerPool]:
    with open_pool(function) as pool:
        yield pool


def open_pool(function: Path, timeout_seconds: float = 30.0, num_workers: int = 2) -> WorkerPool:
    arguments = {"path": str(function), "function": "act"}
    return WorkerPool(
        "rlprior.tasks.reward:load_reward",
        arguments,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
    )


def act(pool: WorkerPool, *items: tuple[str, object]) -> list[Any]:
    results = pool.map([[prompt, str(response), ""] for prompt, response in items])
    return [result if isinstance(result, Status) else result["reward"] for result in results]


def is_running(process_id: int) -> bool:
    """Whether a process is there and not a zombie, which nobody may be there to collect."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it comes true, with time for a machine that is busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_results_come_in_order_from_processes_that_stay(pool: WorkerPool) -> None:
    assert pool.process_ids == [], "nothing is started before there is something to do"
    assert act(pool) == []
    # the first takes longest
    assert act(pool, *(("slow", n) for n in (6, 0, 3, 1, 0, 2))) == [6, 0, 3, 1, 0, 2]
    workers = set(pool.process_ids)
    assert len(workers) == 2
    assert set(act(pool, *[("pid", "")] * 20)) <= workers
    assert set(pool.process_ids) == workers
    pool.close()
    assert not any(is_running(worker) for worker in workers)
    assert act(pool, ("say", 1)) == [1], "a closed pool starts anew"


def test_a_deadline_costs_the_item_that_missed_it_and_a_process(function: Path) -> None:
    with open_pool(function, timeout_seconds=1.0) as pool:
        late = Status.TIMED_OUT
        assert act(pool, ("say", 1), ("wait", ""), ("say", 2), ("hold", ""), ("say", 3)) == [
            1,
            late,
            2,
            late,
            3,
        ]
        assert act(pool, ("stop", ""), ("say", 4)) == [late, 4], "a stopped process is killed all the same"
        assert len(set(pool.process_ids)) == 2
        assert act(pool, *(("say", n) for n in range(5))) == list(range(5))


def test_memory_is_bounded(pool: WorkerPool) -> None:
    small, large = 10**6, 2 * MAX_GROWTH_BYTES
    assert act(pool, ("fill", small), ("fill", large), ("fill", small)) == [small, Status.FAILED, small]
    assert len(pool.process_ids) == 2


def test_a_process_killed_from_outside_costs_the_item_it_worked_on(pool: WorkerPool) -> None:
    act(pool, ("say", 0))

    def kill() -> None:
        time.sleep(0.3)
        os.kill(pool.process_ids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    results = act(pool, *[("slow", 20)] * 4)
    killer.join()
    assert sorted(map(str, results)) == ["20.0", "20.0", "20.0", "failed"]
    assert len(pool.process_ids) == 2


def test_idle_processes_killed_from_outside_are_replaced(pool: WorkerPool) -> None:
    first = act(pool, *(("slow", 1) for _ in range(4)))
    workers = pool.process_ids
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
        os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # dead to the last thread
    results = act(pool, *(("slow", 1) for _ in range(6)))
    assert first == [1] * 4
    assert results == [1] * 6
    assert len(pool.process_ids) == 2
    assert not set(pool.process_ids) & set(workers)


PARENT = """
import sys
from rlprior.tasks.workers import WorkerPool

path, prompt, timeout = sys.argv[1:]
arguments = {"path": path, "function": "act"}
with WorkerPool("rlprior.tasks.reward:load_reward", arguments, num_workers=2, timeout_seconds=float(timeout)) as pool:
    pool.map([["say", "1", ""]])
    print(*pool.process_ids, flush=True)
    pool.map([[prompt, "", ""]] * 2)
"""


@pytest.fixture
def start_parent(function: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], list[int]]]]:
    parents: list[subprocess.Popen[str]] = []

    def start(prompt: str, timeout_seconds: float) -> tuple[subprocess.Popen[str], list[int]]:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(function), prompt, str(timeout_seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        parents.append(parent)
        assert parent.stdout
        workers = [int(word) for word in parent.stdout.readline().split()]
        busy = {int(parent.stdout.readline()) for _ in workers}
        assert busy == set(workers)
        assert len(workers) == 2
        return parent, workers

    yield start
    for parent in parents:
        parent.kill()
        parent.communicate()


# Python's lock keeps a worker from looking for its parent: the timer of twice the deadline and a second is the kernel's
@pytest.mark.parametrize(("prompt", "timeout_seconds"), [("wait", 300.0), ("hold", 1.0)])
def test_workers_end_with_a_parent_that_is_killed(
    start_parent: Callable[..., Any], prompt: str, timeout_seconds: float
) -> None:
    parent, workers = start_parent(prompt, timeout_seconds)
    assert all(is_running(worker) for worker in workers)
    parent.kill()
    assert wait_until(lambda: not any(is_running(worker) for worker in workers))


def test_ctrl_c_is_the_parents_alone(start_parent: Callable[..., Any]) -> None:
    parent, workers = start_parent("wait", 300.0)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == -signal.SIGINT
    assert errors.count("KeyboardInterrupt") == 1, "no worker has anything to say"
    assert not any(is_running(worker) for worker in workers)
