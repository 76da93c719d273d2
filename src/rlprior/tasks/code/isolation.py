"""Walls that a Linux process puts up around itself and can never take down: limits, namespaces, Landlock and seccomp.

The standard library alone: the sandbox imports this file without the rest of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import stat
import struct
from collections.abc import Iterable

from rlprior.tasks.code.seccomp import syscall_filter

REQUIRED_WALLS = frozenset({"landlock", "seccomp"})
"""Without these nothing runs. Namespaces are a further wall around what both already refuse, and many containers have none."""

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
_CAPABILITY_VERSION_3 = 0x20080522
# System calls newer than 2011 have one number on all machines.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_ASK_VERSION = 1
_LANDLOCK_PATH_BENEATH = 1
_READ_FILE, _READ_DIRECTORY = 1 << 2, 1 << 3
_NUM_FILE_RIGHTS = (13, 14, 15, 15, 16)
"""How many rights over files each version of Landlock knows, from the first; the last for all that follow."""
_TCP_BIND_AND_CONNECT = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

_LIBC = ctypes.CDLL(None, use_errno=True)


def limit_resources(max_memory_bytes: int, max_cpu_seconds: int) -> None:
    """Bound address space and processor time; no new processes for whoever is not root, no core file, nothing written to a file.

    Raises:
        OSError, ValueError: the system refuses.
    """
    limits = {
        resource.RLIMIT_AS: (max_memory_bytes, max_memory_bytes),
        # SIGXCPU at the first and SIGKILL at the second
        resource.RLIMIT_CPU: (max_cpu_seconds, max_cpu_seconds + 1),
        resource.RLIMIT_NPROC: (0, 0),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (64, 64),
    }
    for limit, (soft, hard) in limits.items():
        _, ceiling = resource.getrlimit(limit)
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(limit, (soft, hard))


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; at once where it is gone already."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def raise_walls(readable: Iterable[str]) -> list[str]:
    """Put up every wall that this system has.

    Args:
        readable: files and folders that may still be read; the rest of the file system may not.

    Returns:
        The names of those that stand, of "namespaces", "landlock" and "seccomp".

    Raises:
        OSError: one that the system has could not be put up.
    """
    walls: list[str] = []
    with contextlib.suppress(OSError):
        _call("unshare", _NEW_USER | _NEW_NETWORK | _NEW_IPC)
        walls.append("namespaces")
    # those of root, and of whoever owns a new user namespace
    _call("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if version := _landlock_version():
        _restrict_files(version, readable)
        walls.append("landlock")
    _filter_syscalls()
    return [*walls, "seccomp"]


def _landlock_version() -> int:
    """0 where there is none, or where it is switched off."""
    try:
        return _call("syscall", _LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_ASK_VERSION)
    except OSError:
        return 0


def _restrict_files(version: int, readable: Iterable[str]) -> None:
    file_rights = (1 << _NUM_FILE_RIGHTS[min(version, len(_NUM_FILE_RIGHTS)) - 1]) - 1
    fields = [file_rights]
    if version >= 4:
        fields.append(_TCP_BIND_AND_CONNECT)
    if version >= 6:
        fields.append(_ABSTRACT_SOCKETS_AND_SIGNALS)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _call("syscall", _LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    for path in readable:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            _allow_reading(ruleset, path)
    _call("syscall", _LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow_reading(ruleset: int, path: str) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rights = _READ_FILE | (_READ_DIRECTORY if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 0)
    rule = struct.pack("=Qi", rights, descriptor)
    _call("syscall", _LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0)
    os.close(descriptor)


def _filter_syscalls() -> None:
    instructions = syscall_filter(os.uname().machine)
    program = ctypes.create_string_buffer(instructions, len(instructions))
    # struct sock_fprog: how many instructions, and where they are
    description = struct.pack("@HP", len(instructions) // 8, ctypes.addressof(program))
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, description, 0, 0)


def _call(name: str, *arguments: int | bytes | None) -> int:
    """A function of the C library, whose variadic ones read whole registers."""
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = getattr(_LIBC, name)(*words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
