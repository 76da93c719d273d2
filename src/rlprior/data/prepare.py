"""The data stage: train a tokenizer, tokenize every source, write the corpus that all arms of a study read.

corpus/manifest.json                    the config, and what each source came to
corpus/tokenizer/                       Hugging Face folder
corpus/sources/<name>/<side>.tokens.npy      all documents of one side (train or held_out), concatenated
corpus/sources/<name>/<side>.offsets.npy     [documents + 1] where each begins
corpus/sources/<name>/<side>.bytes.npy       [documents] UTF-8 bytes
corpus/sources/<name>/<side>.ids.npy         [documents] hash of the text
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlprior.config import UsageError, differing_keys, encode
from rlprior.data.config import DataConfig, SourceConfig
from rlprior.data.documents import Document, read_documents, source_files
from rlprior.data.packing import Corpus
from rlprior.data.tokenizer import (
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    token_dtype,
    train_tokenizer,
)
from rlprior.runs import Run, disk_errors, file_hash, sync_directory, write_json
from rlprior.tasks.config import resolve_path

CODE = ("rlprior.data", "rlprior.tasks", "rlprior.seeding")
SIDES = ("train", "held_out")
BATCH_CHARACTERS = 2_000_000

Progress = Callable[[str, int], None]
"""Called with what is being done (`tokenizer`, or a source's name) and the bytes of text read for it so far."""


def run(config: DataConfig, run: Run) -> Path:
    """Prepare the corpus in the run's directory. Returns its folder."""
    directory = run.directory / "corpus"
    if run.result is not None:
        return directory
    phases = ["tokenizer", *(source.name for source in config.sources)]

    def report(phase: str, num_bytes: int) -> None:
        run.progress(
            phases.index(phase), len(phases), unit="sources", note=f"{phase}: {num_bytes / 1e6:.1f} MB read"
        )

    prepare(config, directory, report)
    sources = Corpus.open(directory).manifest["sources"]
    num_tokens = {name: source["train"]["tokens"] for name, source in sources.items()}
    run.finish({"corpus": directory.name, "train_tokens": num_tokens})
    return directory


def input_files(config: DataConfig) -> dict[str, Path]:
    """Files and folders of the user's that the corpus depends on, by what they are for.

    Raises:
        UsageError: a source's path names no file.
    """
    files = {
        f"source {source.name} file {number}": path
        for source in config.sources
        for number, path in enumerate(source_files(source, config))
    }
    if config.tokenizer.path is not None:
        files["tokenizer"] = _tokenizer_path(config.tokenizer.path, config)
    return files


def prepare(config: DataConfig, directory: Path, progress: Progress | None = None) -> None:
    """Write the corpus of `config` as `directory`: aside first, then renamed, so that it is there whole or not at all.

    A corpus of the same config that is there already is kept.

    Args:
        directory: the new folder; its parent is made.
        progress: called after each batch of documents.

    Raises:
        UsageError: `directory` holds something else, or the config names what does not exist.
        RunError: content that cannot be used, or a full disk.
    """
    if directory.exists():
        _check_same_config(config, directory)
        return
    aside = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with disk_errors(directory):
            aside.mkdir(parents=True)
            _write_corpus(config, aside, progress or (lambda phase, num_bytes: None))
            aside.rename(directory)
            sync_directory(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_same_config(config: DataConfig, directory: Path) -> None:
    found = Corpus.open(directory).manifest["config"]
    if different := differing_keys(found, _plain_config(config)):
        raise UsageError(
            f"{directory}: holds another corpus (it differs in {', '.join(different[:4])}); choose another folder or delete it"
        )


def _plain_config(config: DataConfig) -> dict[str, Any]:
    """The config as plain data, without the folder that its paths are relative to: a moved folder is the same data."""
    return {key: value for key, value in encode(config).items() if key != "data_dir"}


def _write_corpus(config: DataConfig, directory: Path, progress: Progress) -> None:
    tokenizer = _make_tokenizer(config, progress)
    save_tokenizer(tokenizer, directory / "tokenizer")
    sources = {
        source.name: _write_source(source, config, tokenizer, directory / "sources" / source.name, progress)
        for source in config.sources
    }
    manifest = {
        "config": _plain_config(config),
        "python": platform.python_version(),
        "vocab_size": len(tokenizer),
        "sources": sources,
    }
    write_json(directory / "manifest.json", manifest)


def _tokenizer_path(path: str, config: DataConfig) -> Path:
    return resolve_path(path, Path(config.data_dir) if config.data_dir else None)


def _make_tokenizer(config: DataConfig, progress: Progress) -> PreTrainedTokenizerFast:
    if config.tokenizer.path is not None:
        return load_tokenizer(_tokenizer_path(config.tokenizer.path, config))
    return train_tokenizer(_training_texts(config, progress), config.tokenizer.vocab_size)


def _training_texts(config: DataConfig, progress: Progress) -> Iterator[str]:
    """Training documents, an equal number of bytes from each source; held-out text never shapes the vocabulary."""
    max_bytes = config.tokenizer.max_training_bytes / len(config.sources)
    total = 0
    for source in config.sources:
        num_bytes = 0
        for document, held_out in read_documents(source, config):
            if held_out:
                continue
            yield document.text
            num_bytes += len(document.text.encode())
            if num_bytes >= max_bytes:
                break
        total += num_bytes
        progress("tokenizer", total)


def _write_source(
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Tokenize one source. Held-out documents are distinct: copies of one would count it several times."""
    directory.mkdir(parents=True)
    dtype = token_dtype(len(tokenizer))
    held_out_ids: set[str] = set()
    num_bytes = 0
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_DocumentWriter(directory, side, dtype)) for side in SIDES]
        for batch in _batched(read_documents(source, config)):
            encoded = encode_documents(tokenizer, [document.text for document, _ in batch])
            for (document, held_out), token_ids in zip(batch, encoded, strict=True):
                num_bytes += len(document.text.encode())
                if held_out and document.id in held_out_ids:
                    continue
                if held_out:
                    held_out_ids.add(document.id)
                writers[held_out].append(document, token_ids)
            progress(source.name, num_bytes)
    return {side: writer.finish() for side, writer in zip(SIDES, writers, strict=True)}


def _batched(
    documents: Iterator[tuple[Document, bool]],
) -> Iterator[Sequence[tuple[Document, bool]]]:
    """Documents in batches large enough to keep the tokenizer busy and small enough to hold in memory."""
    size = 0

    def batch_number(item: tuple[Document, bool]) -> int:
        nonlocal size
        size += len(item[0].text)
        return size // BATCH_CHARACTERS

    for _, group in itertools.groupby(documents, key=batch_number):
        yield list(group)


class _DocumentWriter:
    """Appends documents to the four files of one side; the tokens never have to fit in memory."""

    def __init__(self, directory: Path, side: str, dtype: np.dtype[Any]) -> None:
        self._directory, self._side, self._dtype = directory, side, dtype
        self._offsets, self._num_bytes, self._ids = array("q", [0]), array("q"), list[str]()
        self._file: IO[bytes] | None = None

    def _path(self, name: str) -> Path:
        return self._directory / f"{self._side}.{name}.npy"

    def _write_header(self, file: IO[bytes], num_tokens: int) -> None:
        # NumPy pads this header for a first axis of any length, so that it can be written again in place.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (num_tokens,),
        }
        np.lib.format.write_array_header_1_0(file, header)

    def __enter__(self) -> _DocumentWriter:
        self._file = self._path("tokens").open("wb")
        self._write_header(self._file, 0)
        return self

    def append(self, document: Document, token_ids: np.ndarray) -> None:
        assert self._file is not None
        self._file.write(token_ids.tobytes())
        self._offsets.append(self._offsets[-1] + len(token_ids))
        self._num_bytes.append(len(document.text.encode()))
        self._ids.append(document.id)

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        with self._file:
            self._file.seek(0)
            self._write_header(self._file, self._offsets[-1])
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> dict[str, Any]:
        """Write the other files; what the side came to, for the manifest."""
        np.save(self._path("offsets"), np.array(self._offsets, dtype=np.int64))
        np.save(self._path("bytes"), np.array(self._num_bytes, dtype=np.int64))
        np.save(self._path("ids"), np.array(self._ids, dtype="S16"))
        return {
            "documents": len(self._ids),
            "tokens": self._offsets[-1],
            "bytes": sum(self._num_bytes),
            "sha256": file_hash(self._path("tokens")),
        }
