"""Files that survive a kill at any byte, and errors of the disk in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlprior.config import RunError

_AGAIN = "free some space and run the same command again, it goes on from the last checkpoint"

_ELSEWHERE = "choose another --out"

_DISK_ERRORS = {
    errno.ENOSPC: f"the disk is full; {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; {_AGAIN}",
    errno.EROFS: f"the disk is read-only; {_ELSEWHERE}",
    errno.EACCES: f"no permission to write there; {_ELSEWHERE}",
    errno.EPERM: f"no permission to write there; {_ELSEWHERE}",
    errno.EEXIST: f"a file stands where a folder has to be; {_ELSEWHERE}",
    errno.ENOTDIR: f"a file stands where a folder has to be; {_ELSEWHERE}",
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk that is full or may not be written into one line that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunError(f"{path}: {_DISK_ERRORS[error.errno]}") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; it takes the place of `path` at the end, and is gone where that fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path):
        try:
            yield aside
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it to disk, and rename it over: a reader sees the old file or the new one."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file that only this package writes; a line torn by a kill can only be the last and is dropped."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    lines = path.read_bytes().split(b"\n")
    for line in lines[:-1]:
        records.append(json.loads(line))
    return records


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one record a line, at once or not at all."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
