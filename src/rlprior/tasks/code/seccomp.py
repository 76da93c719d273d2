"""A seccomp filter that leaves a Python program its memory, its clock and the reading of files.

What is not listed is refused: processes and threads, programs, sockets, signals, other processes, namespaces, devices, and every call
that changes a file system. The standard library alone: the sandbox imports this file without the rest of the package.
"""

from __future__ import annotations

import os
import struct

ALLOWED = {
    # name: (x86_64, aarch64), None where the machine has no such call
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "lseek": (8, 62),
    "readv": (19, 65),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "writev": (20, 66),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "poll": (7, None),
    "select": (23, None),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    # what is said of files, which Landlock does not restrict
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getdents64": (217, 61),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "brk": (12, 214),
    "madvise": (28, 233),
    "futex": (202, 98),
    # handlers of its own signals
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    # time
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "sched_yield": (24, 124),
    "times": (100, 153),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    # what it is and where it runs
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "uname": (63, 160),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "sched_getaffinity": (204, 123),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
"""Calls that are allowed whatever their arguments.

Source: the kernel's tables, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

_OPENAT, _FCNTL, _IOCTL, _PRLIMIT64 = (257, 56), (72, 25), (16, 29), (302, 261)
_AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Without F_SETOWN and F_SETFL: a pipe that is made asynchronous signals whom it is told to.
_FCNTL_COMMANDS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
_IOCTL_REQUESTS = (0x5401, 0x5451, 0x5450)  # TCGETS, FIOCLEX, FIONCLEX

_LOAD, _EQUALS, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_KILL, _ALLOW, _REFUSE = 0x80000000, 0x7FFF0000, 0x00050001  # the last: EPERM
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def syscall_filter(machine: str) -> bytes:
    """The filter as an array of `struct sock_filter`.

    Args:
        machine: as `os.uname` names it.

    Raises:
        OSError: the machine's system calls are not known here.
    """
    if machine not in _AUDIT_ARCHITECTURES:
        raise OSError(f"there is no list of system calls for {machine}")
    column = list(_AUDIT_ARCHITECTURES).index(machine)
    lines = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUALS, _AUDIT_ARCHITECTURES[machine], skip_if=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
    ]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            lines += [_instruction(_EQUALS, number, skip_else=1), _instruction(_RETURN, _ALLOW)]
    lines += _when(_OPENAT[column], _unless_any_bit(2, _WRITING_FLAGS))
    lines += _when(_FCNTL[column], _if_one_of(1, _FCNTL_COMMANDS))
    lines += _when(_IOCTL[column], _if_one_of(1, _IOCTL_REQUESTS))
    # limits may be read, not set: the pointer to new ones is null
    lines += _when(_PRLIMIT64[column], _if_null(2))
    lines.append(_instruction(_RETURN, _REFUSE))
    return b"".join(lines)


def _instruction(code: int, operand: int, *, skip_if: int = 0, skip_else: int = 0) -> bytes:
    return struct.pack("=HBBI", code, skip_if, skip_else, operand)


def _when(number: int, decision: list[bytes]) -> list[bytes]:
    """`decision`, which ends the filter, for one system call."""
    return [_instruction(_EQUALS, number, skip_else=len(decision)), *decision]


def _unless_any_bit(argument: int, bits: int) -> list[bytes]:
    return [
        _instruction(_LOAD, _ARGUMENTS + 8 * argument),
        _instruction(_ANY_BIT, bits, skip_if=1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _REFUSE),
    ]


def _if_one_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
    lines = [_instruction(_LOAD, _ARGUMENTS + 8 * argument)]
    for value in values:
        lines += [_instruction(_EQUALS, value, skip_else=1), _instruction(_RETURN, _ALLOW)]
    return [*lines, _instruction(_RETURN, _REFUSE)]


def _if_null(argument: int) -> list[bytes]:
    """Both halves of the argument are zero."""
    low = _ARGUMENTS + 8 * argument
    return [
        _instruction(_LOAD, low),
        _instruction(_EQUALS, 0, skip_else=3),
        _instruction(_LOAD, low + 4),
        _instruction(_EQUALS, 0, skip_else=1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _REFUSE),
    ]
