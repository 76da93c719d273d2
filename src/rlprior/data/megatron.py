"""Megatron's indexed data sets: token ids in `<prefix>.bin`, and in `<prefix>.idx` which of them are a document.

The index, little-endian: 9 bytes `MMIDIDX\\0\\0`; u64 version 1; u8 type of the ids; u64 sequences; u64 document borders; then an i32
length and an i64 byte offset for each sequence, and an i64 sequence number for each document border, the first 0. A document is the
sequences between two borders.

Source: NVIDIA Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlprior.config import RunError, UsageError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_TYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
"""The two types that Megatron's own preprocessing writes; its format has codes for others."""


def megatron_files(path: Path) -> tuple[Path, Path]:
    """The index and the token ids of a data set, named by its index.

    Raises:
        UsageError: not the name of an index, or one of the two files is missing.
    """
    if path.suffix != ".idx":
        raise UsageError(f"{path}: not a Megatron index; name the .idx file, its .bin has to be beside it")
    files = path, path.with_suffix(".bin")
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: no such file; a Megatron data set is an .idx and a .bin file")
    return files


def read_megatron(path: Path) -> Iterator[np.ndarray]:
    """Token ids of each document of a data set, memory-mapped, in order.

    Args:
        path: its index.

    Raises:
        UsageError: a file is missing.
        RunError: an index of another format or version, ids that are neither int32 nor uint16, or damaged files.
    """
    index, binary = megatron_files(path)
    token_ends, borders, dtype = _read_index(index, binary.stat().st_size)
    # an empty file cannot be mapped
    tokens = np.asarray(np.memmap(binary, dtype, mode="r")) if binary.stat().st_size else np.empty(0, dtype)
    start = 0
    for border in borders[1:]:
        end = int(token_ends[border - 1]) if border else 0
        yield tokens[start:end]
        start = end


def _read_index(path: Path, num_bytes: int) -> tuple[np.ndarray, np.ndarray, np.dtype[np.integer]]:
    """Where each sequence ends, counted in tokens; the document borders; the type of the ids in a file of `num_bytes`."""
    content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    if bytes(content[: len(_MAGIC)]) != _MAGIC:
        raise RunError(f"{path}: not a Megatron index: it does not begin with MMIDIDX")
    if len(content) < _HEADER.size:
        raise _damaged(path, "its header is cut off")
    _, version, code, num_sequences, num_borders = _HEADER.unpack(bytes(content[: _HEADER.size]))
    if version != 1:
        raise RunError(f"{path}: version {version} of Megatron's index; only version 1 can be read")
    if code not in _TOKEN_TYPES:
        raise RunError(f"{path}: ids of type code {code}; only 4 (int32) and 8 (uint16) are token ids")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_borders
    if len(content) == expected + num_sequences and num_sequences:
        raise RunError(f"{path}: a multimodal data set; only text can be read")
    if len(content) != expected:
        raise _damaged(path, f"its header promises {expected} bytes, and it has {len(content)}")
    lengths, offsets, borders = (
        np.frombuffer(content, kind, count, start)
        for kind, count, start in (
            ("<i4", num_sequences, _HEADER.size),
            ("<i8", num_sequences, _HEADER.size + 4 * num_sequences),
            ("<i8", num_borders, _HEADER.size + 12 * num_sequences),
        )
    )
    dtype = _TOKEN_TYPES[code]
    token_ends = np.cumsum(lengths, dtype=np.int64)
    if (lengths < 0).any() or not np.array_equal(offsets, (token_ends - lengths) * dtype.itemsize):
        raise _damaged(path, "its sequences do not follow each other")
    if num_borders == 0 or borders[0] != 0 or borders[-1] != num_sequences or (np.diff(borders) < 0).any():
        raise _damaged(path, "its document borders do not cover its sequences")
    total = dtype.itemsize * (int(token_ends[-1]) if num_sequences else 0)
    if total != num_bytes:
        raise _damaged(path, f"it describes {total} bytes of ids, and {path.stem}.bin has {num_bytes}")
    return token_ends, borders, dtype


def _damaged(path: Path, what: str) -> RunError:
    return RunError(f"{path}: the Megatron index is damaged: {what}; copy or write the data set again")
