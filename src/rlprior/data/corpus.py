"""A prepared corpus on disk: appended to by the data stage, memory-mapped by whatever reads it.

manifest.json                               the config, and what each source came to
tokenizer/                                  Hugging Face folder
sources/<name>/<side>.tokens-<shard>.npy    all documents of one side (train or held_out), concatenated; none is in two shards
sources/<name>/<side>.offsets.npy           [documents + 1] where each begins in the shards laid end to end
sources/<name>/<side>.bytes.npy             [documents] UTF-8 bytes
sources/<name>/<side>.ids.npy               [documents] hash of the text
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from rlprior.config import RunError, UsageError
from rlprior.runs.files import file_hash, sync_directory

Side = Literal["train", "held_out"]
SIDES: tuple[Side, Side] = ("train", "held_out")

SHARD_TOKENS = 1 << 30
"""Most tokens in one file, unless one document alone has more. Every shard is one open file of each process that reads it."""

COUNTED_TOKENS = 1 << 24


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents of one side of one source, memory-mapped.

    Attributes:
        shards: token ids, uint16 or uint32; each document between its first token and <|eos|>.
        offsets: [num_documents + 1] int64; where each document begins in the shards laid end to end.
        num_bytes: [num_documents] int64; UTF-8 bytes of the texts, special tokens not counted.
        ids: [num_documents] 16 hexadecimal digits of the texts' SHA-256, as bytes.
    """

    shards: tuple[np.ndarray, ...]
    offsets: np.ndarray
    num_bytes: np.ndarray
    ids: np.ndarray

    @classmethod
    def open(cls, directory: Path, side: Side) -> TokenizedDocuments:
        """Memory-map the files of one side.

        Raises:
            RunError: a file is missing or does not fit the others.
        """
        try:
            offsets, num_bytes, ids = (
                _open_array(directory / f"{side}.{name}.npy") for name in ("offsets", "bytes", "ids")
            )
            shards = tuple(map(_open_array, sorted(directory.glob(f"{side}.tokens-*.npy"))))
        except (OSError, EOFError, ValueError) as error:
            raise RunError(f"{directory}: the corpus is damaged ({error}); prepare it again") from None
        documents = cls(shards, offsets, num_bytes, ids)
        num_documents = {len(offsets) - 1, len(num_bytes), len(ids)}
        if len(num_documents) > 1 or documents.num_tokens != sum(map(len, shards)):
            raise RunError(
                f"{directory}: the corpus is damaged (its {side} files do not fit together); prepare it again"
            )
        return documents

    def __len__(self) -> int:
        return len(self.num_bytes)

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return int(self.offsets[-1])

    @cached_property
    def _shard_starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.shards[:-1])])

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of runs, one after the other.

        Args:
            starts: [num_runs] where each begins in the shards laid end to end; at least one run.
            lengths: [num_runs] at least 1; a run ends inside the document in which it begins.

        Returns:
            [sum(lengths)] uint16 or uint32.
        """
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        begins = starts - self._shard_starts[shards]
        runs = zip(shards.tolist(), begins.tolist(), (begins + lengths).tolist(), strict=True)
        return np.concatenate([self.shards[shard][begin:end] for shard, begin, end in runs])

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document."""
        start, end = self.offsets[index : index + 2]
        return self.gather(np.array([start]), np.array([end - start]))

    def target_counts(self, vocab_size: int) -> np.ndarray:
        """[vocab_size] int64: how often each token comes after another one of its document, counted on the first shard."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        first_shard = self.shards[0]
        for start in range(
            0, len(first_shard), COUNTED_TOKENS
        ):  # np.bincount makes an int64 copy of what it counts
            counts += np.bincount(first_shard[start : start + COUNTED_TOKENS], minlength=vocab_size)
        num_documents = np.searchsorted(self.offsets[:-1], len(first_shard))
        return counts - np.bincount(first_shard[self.offsets[:num_documents]], minlength=vocab_size)


def _open_array(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.asarray(array)  # a plain view of the map: indexing a memmap costs several times more


@dataclass(frozen=True)
class TokenizedSource:
    """The two sides of one source."""

    name: str
    train: TokenizedDocuments
    held_out: TokenizedDocuments


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus on disk.

    Attributes:
        directory: where it is.
        sources: by name.
        manifest: what `prepare` wrote about it.
    """

    directory: Path
    sources: Mapping[str, TokenizedSource]
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Corpus:
        """Open a corpus, or the run directory of the data stage that holds one.

        Raises:
            UsageError: there is no corpus.
            RunError: the corpus is damaged.
        """
        root = directory / "corpus" if (directory / "corpus").is_dir() else directory
        path = root / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            folders = {name: root / "sources" / name for name in manifest["sources"]}
            sources = {
                name: TokenizedSource(name, *(TokenizedDocuments.open(folder, side) for side in SIDES))
                for name, folder in folders.items()
            }
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"{directory}: no corpus there; prepare one first") from None
        except (ValueError, KeyError):
            raise RunError(f"{path}: not a corpus manifest; prepare the corpus again") from None
        return cls(root, sources, manifest)

    @property
    def tokenizer_directory(self) -> Path:
        """Hugging Face folder of the tokenizer."""
        return self.directory / "tokenizer"

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return self.manifest["vocab_size"]

    def source(self, name: str) -> TokenizedSource:
        """A source by name; UsageError with the names that exist."""
        if name not in self.sources:
            raise UsageError(f"the corpus has no source {name!r}; it has {', '.join(self.sources)}")
        return self.sources[name]

    def held_out_documents(
        self, sources: Sequence[str], max_tokens: int | None
    ) -> Iterator[tuple[str, int, np.ndarray, int]]:
        """Whole held-out documents, in a fixed order that gives the sources equal shares of tokens while they last.

        A smaller `max_tokens` gives a prefix of what a larger one gives.

        Args:
            sources: names.
            max_tokens: stop once so many targets (a document's tokens but its first) were given; None for all documents.

        Yields:
            Source, document number in it, token ids, UTF-8 bytes of the text.
        """
        sides = {name: self.source(name).held_out for name in sources}
        orders = {name: iter(np.argsort(side.ids, kind="stable").tolist()) for name, side in sides.items()}
        given = dict.fromkeys(sides, 0)
        while orders and (max_tokens is None or sum(given.values()) < max_tokens):
            name = min(orders, key=lambda name: given[name])
            index = next(orders[name], None)
            if index is None:
                del orders[name]
                continue
            ids = sides[name].document(index)
            given[name] += len(ids) - 1
            yield name, index, ids, int(sides[name].num_bytes[index])


class SideRecord(TypedDict):
    """What one side of one source came to: part of the manifest, and all that appending goes on from.

    `shards` has the `tokens` and the `sha256` of each finished token file.
    """

    documents: int
    tokens: int
    bytes: int
    shards: list[dict[str, Any]]


class DocumentWriter:
    """Appends documents to the files of one side; they never have to fit in memory.

    After `sync`, its record is enough to go on: whatever was appended later is cut off.
    """

    def __init__(
        self, directory: Path, side: Side, dtype: np.dtype[Any], record: SideRecord | None = None
    ) -> None:
        """Go on from `record`, or begin."""
        self.record: SideRecord = record or {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
        self._directory, self._side, self._dtype = directory, side, dtype
        num_documents = self.record["documents"]
        with contextlib.ExitStack() as stack:
            self._num_bytes = stack.enter_context(_ArrayWriter(self._path("bytes"), "<i8", num_documents))
            self._ids = stack.enter_context(_ArrayWriter(self._path("ids"), "S16", num_documents))
            num_offsets = num_documents + 1 if record else 0
            self._offsets = stack.enter_context(_ArrayWriter(self._path("offsets"), "<i8", num_offsets))
            if not record:
                self._offsets.append(np.zeros(1, dtype="<i8"))
            num_finished = sum(shard["tokens"] for shard in self.record["shards"])
            self._tokens = self._open_shard(self.record["tokens"] - num_finished)
            stack.pop_all()

    def _path(self, name: str) -> Path:
        return self._directory / f"{self._side}.{name}.npy"

    def _open_shard(self, num_tokens: int = 0) -> _ArrayWriter:
        path = self._path(f"tokens-{len(self.record['shards']):05d}")
        return _ArrayWriter(path, self._dtype, num_tokens)

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for array in (self._tokens, self._offsets, self._num_bytes, self._ids):
            array.close()

    def read_ids(self) -> set[str]:
        """Hashes of the texts so far."""
        return {text_id.decode() for text_id in self._ids.read().tolist()}

    def append(self, token_ids: np.ndarray, *, num_bytes: int, text_id: str) -> None:
        """Write one document: its tokens, the UTF-8 bytes of its text, and 16 hexadecimal digits of that text's hash."""
        if self._tokens.length > 0 and self._tokens.length + len(token_ids) > SHARD_TOKENS:
            self._finish_shard()
            self._tokens = self._open_shard()
        self.record["documents"] += 1
        self.record["tokens"] += len(token_ids)
        self.record["bytes"] += num_bytes
        self._tokens.append(token_ids)
        self._offsets.append(np.array([self.record["tokens"]], dtype="<i8"))
        self._num_bytes.append(np.array([num_bytes], dtype="<i8"))
        self._ids.append(np.array([text_id], dtype="S16"))

    def _finish_shard(self) -> None:
        self._tokens.finish()
        shard = {"tokens": self._tokens.length, "sha256": file_hash(self._tokens.path)}
        self.record["shards"].append(shard)

    def sync(self) -> None:
        """Flush to disk what was appended."""
        for array in (self._tokens, self._offsets, self._num_bytes, self._ids):
            array.sync()
        sync_directory(self._directory)

    def finish(self) -> None:
        """Make the files whole arrays; nothing can be appended any more."""
        self._finish_shard()
        for array in (self._offsets, self._num_bytes, self._ids):
            array.finish()
        sync_directory(self._directory)


class _ArrayWriter:
    """A one-dimensional `.npy` file that grows: its header tells the length once it is finished."""

    def __init__(self, path: Path, dtype: Any, length: int) -> None:
        self.path, self.length, self._dtype = path, length, np.dtype(dtype)
        self._file = path.open("r+b" if length else "wb")
        try:
            self._write_header()
            self._start = self._file.tell()
            self._file.truncate(self._start + length * self._dtype.itemsize)
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self.close()
            raise

    def _write_header(self) -> None:
        # NumPy pads this header for a first axis of any length, so that it can be written again in place.
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> _ArrayWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> np.ndarray:
        self._file.flush()
        return np.fromfile(self.path, self._dtype, self.length, offset=self._start)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.tobytes())
        self.length += len(values)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        self.sync()
        self._file.close()

    def close(self) -> None:
        # a full disk may keep what is in the buffer: the caller knows of it already
        with contextlib.suppress(OSError):
            self._file.close()
