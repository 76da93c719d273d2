"""The sandbox: what it must refuse is refused, by the wall that is said to refuse it, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.tasks.code.attacks import ESCAPES, EXHAUSTIONS, Escape, Exhaustion

from rlprior.config import RunError
from rlprior.tasks.code import sandbox as sandbox_module
from rlprior.tasks.code.sandbox import Outcome, Request, Sandbox
from rlprior.tasks.code.values import encode
from rlprior.tasks.problem import Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is the Linux kernel's")

REMOVALS = {
    "seccomp": ("isolation.py", "    _filter_syscalls()\n", "    pass\n"),
    "landlock": ("isolation.py", "if version := _landlock_version():", "if version := 0:"),
    "namespaces": ("isolation.py", "_NEW_USER | _NEW_NETWORK | _NEW_IPC)", "-1)"),
    "capabilities": ("isolation.py", '_call("capset", ', '(lambda *_: None)("capset", '),
    "limits": ("child.py", "isolation.limit_resources(", "(lambda *_: None)("),
}
"""Of each wall, what is changed in the file that puts it up."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox
        assert processes_of(sandbox) == []
        assert [path.name for path in sandbox.directory.iterdir()] == ["harness"]
    assert not sandbox.directory.exists()


def processes_of(sandbox: Sandbox) -> list[str]:
    """The command lines of processes of a sandbox that still run."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(sandbox.directory) in command:
            found.append(command)
    return found


def call(
    sandbox: Sandbox, program: str, *arguments: Any, function: str = "attack", seconds: int = 1
) -> Outcome:
    inputs = [encode(list(arguments))]
    request = Request(sources=(("", program),), entry_point=function, inputs=inputs, max_cpu_seconds=seconds)
    return sandbox.run(request)


def remove_walls(sandbox: Sandbox, walls: Sequence[str]) -> None:
    """Change the sandbox's own copy of the files that raise them."""
    for wall in walls:
        change(sandbox, *REMOVALS[wall])


def change(sandbox: Sandbox, name: str, before: str, after: str) -> None:
    file = sandbox.directory / "harness" / "rlprior" / "tasks" / "code" / name
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, after))


@pytest.fixture
def target(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What an escape is after: a file, a folder, a process, a port and a socket outside."""
    (tmp_path / "file").write_text("secret")
    (tmp_path / "directory").mkdir()
    with (
        subprocess.Popen(["sleep", "60"]) as process,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.bind(f"\0rlprior-test-{os.getpid()}")
        local.listen()
        yield {
            "file": str(tmp_path / "file"),
            "directory": str(tmp_path / "directory"),
            "process": process.pid,
            "port": server.getsockname()[1],
            "socket": local.getsockname(),
        }
        process.kill()


@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.name)
def test_no_program_gets_out(escape: Escape, sandbox: Sandbox, target: dict[str, Any]) -> None:
    outcome = call(sandbox, escape.program, target)
    assert outcome.outputs != ["succeeded"]
    assert outcome.status in (None, Status.WRONG, Status.FAILED)
    assert Path(target["file"]).read_text() == "secret"
    assert list(Path(target["directory"]).iterdir()) == []
    assert Path(f"/proc/{target['process']}/stat").read_text().split()[2] != "Z"


@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.name)
def test_each_wall_holds_what_it_is_said_to_hold(escape: Escape, target: dict[str, Any]) -> None:
    """With its walls gone the same program succeeds, unless this machine refuses it to everybody: no refusal above is an accident."""
    with Sandbox(unsafe_exec=True) as sandbox:
        remove_walls(sandbox, escape.walls)
        if call(sandbox, escape.program, target).outputs != ["succeeded"]:
            assert not succeeds_without_a_sandbox(escape, target)
    # what is killed dies when it is its turn, long before a fork bomb's sleep is over
    assert wait_until(lambda: processes_of(sandbox) == [], seconds=20)


def succeeds_without_a_sandbox(escape: Escape, target: dict[str, Any]) -> bool:
    command = [sys.executable, "-c", f"{escape.program}\nprint(attack({target!r}))"]
    return subprocess.run(command, capture_output=True, text=True).stdout == "succeeded\n"


@pytest.mark.parametrize("attack", EXHAUSTIONS, ids=lambda attack: attack.name)
def test_no_program_takes_more_than_it_is_given(
    attack: Exhaustion, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    # those that compute are stopped by their processor time, on a busy machine too
    monkeypatch.setattr(sandbox_module, "GRACE_SECONDS", 0.0 if attack.name == "sleep" else 60.0)
    assert call(sandbox, attack.program, 0).status is attack.status
    assert wait_until(lambda: processes_of(sandbox) == [], seconds=20)


def test_an_honest_program_has_the_standard_library(sandbox: Sandbox) -> None:
    program = """
    import asyncio, bisect, collections, ctypes, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools
    import json, math, operator, os, random, re, statistics, string, sys, typing, zoneinfo

    @dataclasses.dataclass
    class Pair:
        one: "int"

    def attack(items):
        print("said to nobody")
        digest = hashlib.md5("".join(map(str, items)).encode()).hexdigest()
        return sorted(items), digest, os.listdir("."), dict(os.environ).get("HOME"), Pair(1) == Pair(1)
    """
    outcome = call(sandbox, textwrap.dedent(program), [3, 1, 2], seconds=5)
    assert outcome.outputs == [{"tuple": [[1, 2, 3], "950a4152c2b4aa3ad78bdd6b366cc179", [], None, True]}]


def test_sets_have_one_order_in_every_process(sandbox: Sandbox) -> None:
    program = "def attack(words): return list(set(words))\n"
    words = [f"word{number}" for number in range(50)]
    one, other = (call(sandbox, program, words).outputs for _ in range(2))
    assert one == other != [words]


@pytest.mark.parametrize(
    "missing",
    [REMOVALS["landlock"], ("isolation.py", "_PR_SET_SECCOMP, _SECCOMP_MODE", "999, _SECCOMP_MODE")],
    ids=["landlock", "seccomp"],
)
def test_where_programs_cannot_be_isolated_none_runs(missing: tuple[str, str, str]) -> None:
    program = "def attack(x): return x\n"
    with Sandbox() as sandbox:
        change(sandbox, *missing)
        told = r"cannot be isolated here: .*with Landlock and seccomp, or .* with --unsafe-exec$"
        with pytest.raises(RunError, match=told):
            call(sandbox, program, 5)
    with Sandbox(unsafe_exec=True) as sandbox:
        change(sandbox, *missing)
        assert call(sandbox, program, 5).outputs == [5]


def test_without_namespaces_the_other_walls_hold(target: dict[str, Any]) -> None:
    def run(escape: Escape) -> Any:
        return call(sandbox, escape.program, target).outputs

    with Sandbox() as sandbox:
        remove_walls(sandbox, ["namespaces"])
        guarded = [escape for escape in ESCAPES if "namespaces" in escape.walls]
        assert len(guarded) == 4
        assert ["succeeded"] not in sandbox.map(run, guarded)
        assert call(sandbox, "def attack(x): return x\n", 5).outputs == [5]


def test_a_process_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "_COMMAND", "raise SystemExit('no such luck')")
    with Sandbox() as sandbox, pytest.raises(RunError, match="could not be started: no such luck"):
        call(sandbox, "def attack(): pass\n")


def test_programs_run_beside_each_other_and_come_back_in_order() -> None:
    def run(number: int) -> Any:
        return call(sandbox, f"def attack(x): return x + {number}\n", 0).outputs

    with Sandbox(num_workers=4) as sandbox:
        assert sandbox.map(run, range(8)) == [[number] for number in range(8)]


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with Ctrl-C ignored
from rlprior.tasks.code.sandbox import Request, Sandbox
program = "import time\\ndef attack():\\n    time.sleep(3600)\\n"
request = Request(sources=(("", program),), entry_point="attack", inputs=[[]], max_cpu_seconds=1000)
with Sandbox(num_workers=2) as sandbox:
    print(sandbox.directory, flush=True)
    sandbox.map(sandbox.run, [request] * 4)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_programs_end_with_whoever_runs_them(number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as parent:
        assert parent.stdout is not None
        try:
            directory = Path(parent.stdout.readline().strip())
            assert wait_until(lambda: len(running_in(directory)) == 2)
            parent.send_signal(number)
            assert wait_until(lambda: not running_in(directory))
        finally:
            parent.kill()
    assert directory.parent == tmp_path
    assert directory.exists() == (number is signal.SIGKILL)


def running_in(directory: Path) -> list[str]:
    holder = Sandbox()
    holder.directory = directory
    return processes_of(holder)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it comes true, with time for a machine that is busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
