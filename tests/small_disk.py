"""A real file system that fills up."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(directory: Path, num_kib: int) -> Iterator[Path]:
    """A disk of `num_kib` KiB mounted at `directory`; the test is skipped where it may not be mounted."""
    directory.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system mounts no tmpfs")
    try:
        yield directory
    finally:
        # lazily: a failed test may still hold a file open
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(disk: Path, *, leave_kib: int = 0) -> Path:
    """Take all the room but `leave_kib`; returns the file to delete to give it back."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"x" * 512):
            pass
    os.truncate(ballast, max(0, ballast.stat().st_size - 1024 * leave_kib))
    return ballast
