"""Programs that try what a sandbox must refuse. None does harm where it succeeds: it says so, and leaves it at that."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from rlprior.tasks.problem import Status


@dataclass(frozen=True)
class Escape:
    """A program whose `attack(target)` returns "succeeded" where it got what it wanted.

    Attributes:
        walls: it succeeds once all of these are gone, and not before.
    """

    name: str
    program: str
    walls: tuple[str, ...]


@dataclass(frozen=True)
class Exhaustion:
    """A program that takes more than it is given, and what its end must be."""

    name: str
    program: str
    status: Status


@dataclass(frozen=True)
class Forgery:
    """A program that solves nothing and wants to be counted as correct; `attack(x)` should return a secret."""

    name: str
    program: str


def _escape(name: str, body: str, *walls: str) -> Escape:
    head = "import ctypes, errno, os, socket\n\nlibc = ctypes.CDLL(None, use_errno=True)\n\ndef attack(target):\n"
    return Escape(name, head + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n", walls)


def _system_call(name: str, call: str) -> Escape:
    """Refused by the filter, and otherwise either done or refused for want of sensible arguments."""
    body = f"""
    result = {call}
    return "refused" if result < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS) else "succeeded"
    """
    return _escape(name, body, "seccomp")


ESCAPES = (
    # processes
    _escape(
        "posix.system, whatever was done to os.system",
        """
        import posix
        os.system = None
        return "succeeded" if posix.system("exit 7") == 7 << 8 else "refused"
        """,
        *("seccomp", "landlock", "limits"),
    ),
    _escape(
        "fork",
        """
        if os.fork() == 0:
            os._exit(0)
        return "succeeded"
        """,
        *("seccomp", "limits"),
    ),
    _escape(
        "a bounded fork bomb",
        """
        import time
        for _ in range(20):
            if os.fork() == 0:
                os.closerange(0, 64)
                time.sleep(30)
                os._exit(0)
        return "succeeded"
        """,
        *("seccomp", "limits"),
    ),
    _escape(
        "fork through ctypes",
        """
        if (process := libc.fork()) == 0:
            os._exit(0)
        return "succeeded" if process > 0 else "refused"
        """,
        *("seccomp", "limits"),
    ),
    _escape(
        "subprocess",
        """
        import subprocess
        return "succeeded" if subprocess.run(["/bin/sh", "-c", "exit 7"]).returncode == 7 else "refused"
        """,
        *("seccomp", "landlock", "limits"),
    ),
    _escape(
        "a thread that keeps running",
        """
        import threading, time
        threading.Thread(target=time.sleep, args=(3600,)).start()
        return "succeeded"
        """,
        *("seccomp", "limits"),
    ),
    _system_call("execve", 'libc.execve(b"/no/such/program", None, None)'),
    # files
    _escape(
        "read /etc/passwd", 'return "succeeded" if open("/etc/passwd").read() else "refused"', "landlock"
    ),
    _escape(
        "read a file outside",
        'return "succeeded" if open(target["file"]).read() == "secret" else "refused"',
        "landlock",
    ),
    _escape("list the root", 'return "succeeded" if os.listdir("/") else "refused"', "landlock"),
    _escape(
        "read the parent's environment",
        'return "succeeded" if open(f"/proc/{os.getppid()}/environ").read() else "refused"',
        *("landlock", "namespaces", "capabilities"),
    ),
    _escape(
        "read where the parent's memory lies",
        'return "succeeded" if open(f"/proc/{os.getppid()}/maps").read() else "refused"',
        *("landlock", "namespaces", "capabilities"),
    ),
    _escape(
        "write into its own directory",
        """
        with open("here", "w") as file:
            file.write("text")
        return "succeeded"
        """,
        *("seccomp", "landlock", "limits"),
    ),
    _escape(
        "write outside",
        """
        open(os.path.join(target["directory"], "made"), "w")
        return "succeeded"
        """,
        *("seccomp", "landlock"),
    ),
    _escape(
        "write through a symbolic link in its own directory",
        """
        os.symlink(target["directory"], "link")
        open("link/made", "w")
        return "succeeded"
        """,
        *("seccomp", "landlock"),
    ),
    _escape(
        "read through a symbolic link in its own directory",
        """
        if not os.path.lexists("link"):
            os.symlink(target["file"], "link")
        return "succeeded" if open("link").read() == "secret" else "refused"
        """,
        *("seccomp", "landlock"),
    ),
    _escape(
        "make a directory",
        """
        os.mkdir(os.path.join(target["directory"], "made"))
        return "succeeded"
        """,
        *("seccomp", "landlock"),
    ),
    _escape(
        "remove a file",
        """
        os.unlink(target["file"])
        return "succeeded"
        """,
        *("seccomp", "landlock"),
    ),
    _escape(
        "change a file's permissions, which Landlock does not know of",
        """
        os.chmod(target["file"], 0o600)
        return "succeeded"
        """,
        "seccomp",
    ),
    _escape(
        "empty a file without opening it",
        """
        os.truncate(target["file"], 0)
        return "succeeded"
        """,
        *("seccomp", "landlock"),
    ),
    # sockets
    _escape("a TCP socket", 'return "succeeded" if socket.socket(socket.AF_INET) else "refused"', "seccomp"),
    _escape("a Unix socket", 'return "succeeded" if socket.socket(socket.AF_UNIX) else "refused"', "seccomp"),
    _escape("a pair of sockets", 'return "succeeded" if socket.socketpair() else "refused"', "seccomp"),
    _escape(
        "connect to a port of this machine",
        """
        socket.create_connection(("127.0.0.1", target["port"]), timeout=5)
        return "succeeded"
        """,
        *("seccomp", "landlock", "namespaces"),
    ),
    _escape(
        "connect to an abstract Unix socket",
        """
        socket.socket(socket.AF_UNIX).connect(target["socket"])
        return "succeeded"
        """,
        *("seccomp", "landlock", "namespaces"),
    ),
    # other processes
    _escape(
        "kill a process",
        """
        os.kill(target["process"], 9)
        return "succeeded"
        """,
        *("seccomp", "landlock"),
    ),
    _escape(
        "signal its parent",
        """
        os.kill(os.getppid(), 0)
        return "succeeded"
        """,
        *("seccomp", "landlock"),
    ),
    _escape(
        "signal its own group",
        """
        os.killpg(0, 0)
        return "succeeded"
        """,
        "seccomp",
    ),
    _escape(
        "signal its parent by way of a pipe",
        """
        import fcntl
        for descriptor in range(3, 64):
            try:
                fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getppid())
                return "succeeded"
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
        """,
        "seccomp",
    ),
    _system_call("read another process's memory", "libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0)"),
    _system_call("ptrace", "libc.ptrace(0, 0, None, None)"),
    # the kernel's other doors; these three have one number on all machines
    _system_call("io_uring", "libc.syscall(425, 1, None)"),
    _system_call("clone3", "libc.syscall(435, None, 0)"),
    _system_call("pidfd_open", "libc.syscall(434, os.getppid(), 0)"),
    _system_call("namespaces of its own", "libc.unshare(0)"),
    _system_call("a file in memory", 'libc.memfd_create(b"x", 0)'),
    _system_call("live on without its parent", "libc.prctl(1, 0, 0, 0, 0)"),
    _escape(
        "set its own limits",
        """
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        return "succeeded"
        """,
        "seccomp",
    ),
    _escape(
        "take 4 GB",
        """
        import mmap
        mmap.mmap(-1, 4 << 30)
        return "succeeded"
        """,
        "limits",
    ),
)

_ENDLESS = "while True:\n        "

EXHAUSTIONS = (
    Exhaustion("an endless loop", "while True: pass\ndef attack(x): pass\n", Status.TIMED_OUT),
    Exhaustion("an endless call into C", "def attack(x):\n    return 7 ** 7 ** 12 % 2\n", Status.TIMED_OUT),
    Exhaustion("sleep", "import time\ndef attack(x):\n    time.sleep(3600)\n", Status.TIMED_OUT),
    Exhaustion(
        "ignore the limit on processor time",
        f"import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef attack(x):\n    {_ENDLESS}pass\n",
        Status.FAILED,
    ),
    Exhaustion("endless output", f"def attack(x):\n    {_ENDLESS}print('x' * 65536)\n", Status.TIMED_OUT),
    Exhaustion(
        "an endless result",
        f"import os\ndef attack(x):\n    {_ENDLESS}"
        "for descriptor in range(3, 64):\n"
        "            try: os.write(descriptor, b'x' * 65536)\n"
        "            except OSError: pass\n",
        Status.FAILED,
    ),
    Exhaustion(
        "fork for ever",
        f"import os\ndef attack(x):\n    {_ENDLESS}try: os.fork()\n        except OSError: pass\n",
        Status.TIMED_OUT,
    ),
    Exhaustion("memory", "def attack(x):\n    return bytearray(4 << 30)\n", Status.FAILED),
    Exhaustion("a crash", "import ctypes\ndef attack(x):\n    ctypes.string_at(0)\n", Status.FAILED),
    Exhaustion("_exit", "import os\ndef attack(x):\n    os._exit(0)\n", Status.FAILED),
    Exhaustion("exit", "def attack(x):\n    raise SystemExit(0)\n", Status.WRONG),
    Exhaustion(
        "exit later",
        "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit()\ndef attack(x): pass\n",
        Status.WRONG,
    ),
    Exhaustion(
        "a value without end", "def attack(x):\n    x = []\n    x.append(x)\n    return x\n", Status.WRONG
    ),
    Exhaustion("parentheses", f"def attack(x):\n    return {'(' * 5000}{')' * 5000}\n", Status.UNPARSABLE),
)

_WRITE_RESULT = """
import json, os
def attack(x):
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, json.dumps({result}).encode())
        except OSError:
            pass
    os._exit(0)
"""


def forge_result(outputs: object) -> str:
    """A program that writes these outputs where the sandbox would write its own, and ends."""
    return _WRITE_RESULT.replace("{result}", f"{{'outputs': {outputs!r}, 'cpu_seconds': 0.0}}")


FIND_SECRET = """
import gc, sys
def attack(x):
    frame, seen, found = sys._getframe(), [], set()
    while frame:
        seen += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
        frame = frame.f_back
    seen += gc.get_objects()
    for container in seen:
        if isinstance(container, dict):
            container = list(container.values())
        if isinstance(container, (list, tuple, set)):
            found |= {item for item in list(container) if type(item) is int and item.bit_length() == 100}
    return found.pop() if len(found) == 1 else 0
"""
"""Returns the one integer of 100 bits that can be found in its process."""

FORGERIES = (
    Forgery("frames and objects", FIND_SECRET),
    Forgery(
        "an object that equals everything",
        "class Same:\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
        "def attack(x): return Same()\n",
    ),
    Forgery(
        "a number that equals everything",
        "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def attack(x): return Same()\n",
    ),
    Forgery("a result of its own", forge_result([0, 0])),
    Forgery("a result that cannot be read", forge_result("x")),
    Forgery("a result of objects", forge_result([{"object": "int"}, {"object": "int"}])),
    Forgery("a result of a word for everything", forge_result([{"digest": "*"}, {"any": True}])),
    Forgery("a result that is nested deeply", _WRITE_RESULT.replace("json.dumps({result})", "('[' * 10**6)")),
    Forgery(
        "another json",
        'import json\njson.dumps = lambda value: \'{"correct": true, "outputs": [true, true], "cpu_seconds": 0.0}\'\n'
        "def attack(x): return 0\n",
    ),
    Forgery(
        "another harness",
        "import sys\nfor name, module in list(sys.modules.items()):\n    if name.startswith('rlprior'):\n"
        "        for key in ('encode_output', '_run', '_write'):\n            if hasattr(module, key):\n"
        "                setattr(module, key, lambda *a: {'outputs': [None, None], 'cpu_seconds': 0.0})\n"
        "def attack(x): return 0\n",
    ),
    Forgery("builtins", "import builtins\nbuiltins.all = lambda x: True\ndef attack(x): return 0\n"),
    Forgery("not a number", "def attack(x): return float('nan')\n"),
)
