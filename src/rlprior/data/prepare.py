"""The data stage: train a tokenizer, tokenize every source, write the corpus that all arms of a study read.

A corpus is made as `<folder>.partial`, where `manifest.partial.json` makes it safe to kill at any moment: it says how far each source
is, and is replaced only once all that it counts is on the disk. What comes after is cut off and written again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import platform
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlprior.config import RunError, UsageError, differing_keys, encode
from rlprior.data.config import DataConfig, SourceConfig
from rlprior.data.corpus import SIDES, Corpus, DocumentWriter
from rlprior.data.documents import Document, config_path, read_documents, source_files
from rlprior.data.tokenizer import (
    encode_documents,
    frame_documents,
    load_tokenizer,
    save_tokenizer,
    token_dtype,
    train_tokenizer,
)
from rlprior.processes import Pool, open_pool
from rlprior.runs.files import disk_errors, sync_directory, write_json
from rlprior.runs.folder import Run
from rlprior.runs.identity import code_fingerprint

CODE = ("rlprior.data", "rlprior.records", "rlprior.tasks", "rlprior.seeding")
BATCH_CHARACTERS = 2_000_000
COMMIT_TOKENS = 1 << 24
"""New tokens after which the disk's state goes on record: what a killed process loses, about 10 seconds of one core."""

Batch = Sequence[tuple[Document, bool]]
"""Documents, and whether each is held out."""

PARTIAL = "manifest.partial.json"

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
        files["tokenizer"] = config_path(config.tokenizer.path, config)
    return files


def prepare(config: DataConfig, directory: Path, progress: Progress | None = None) -> None:
    """Write the corpus of `config` as `directory`, which is there whole or not at all.

    A corpus of the same config that is there already is kept. An attempt that was killed or found the disk full is gone on with,
    unless a file that it read has changed. The bytes at the end are those of a single attempt, for any `num_workers`.

    Args:
        directory: the new folder; its parent is made.
        progress: called after each batch of documents.

    Raises:
        UsageError: `directory` holds something else, or the config names what does not exist.
        RunError: content that cannot be used, a full disk, or a tokenizing process that was killed.
    """
    if directory.exists():
        _check_same_config(config, directory)
        return
    aside = directory.with_name(f"{directory.name}.partial")
    with disk_errors(directory):
        _Attempt(config, aside, progress or (lambda phase, num_bytes: None)).run()
        (aside / PARTIAL).unlink(missing_ok=True)
        aside.rename(directory)
        sync_directory(directory.parent)


def _check_same_config(config: DataConfig, directory: Path) -> None:
    found = Corpus.open(directory).manifest["config"]
    if different := differing_keys(found, _plain_config(config)):
        raise UsageError(
            f"{directory}: holds another corpus (it differs in {', '.join(different[:4])}); choose another folder or delete it"
        )


def _plain_config(config: DataConfig) -> dict[str, Any]:
    """The config as plain data, without what changes no byte: the folder that paths are relative to, the number of workers."""
    return {key: value for key, value in encode(config, with_how=False).items() if key != "data_dir"}


def _file_stamps(config: DataConfig) -> dict[str, list[int]]:
    """Size and time of the last change of each file that the corpus depends on."""
    stamps: dict[str, list[int]] = {}
    for name, path in input_files(config).items():
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                stamps[f"{name}, {file.name}"] = [file.stat().st_size, file.stat().st_mtime_ns]
    return stamps


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class _Attempt:
    """A corpus in the making. `_state` is what `manifest.partial.json` holds, from the last commit on ahead of it."""

    def __init__(self, config: DataConfig, directory: Path, report: Progress) -> None:
        self._config, self._directory, self._report = config, directory, report
        origin = {
            "config": _plain_config(config),
            "python": platform.python_version(),
            "code": code_fingerprint(CODE),
            "files": _file_stamps(config),
        }
        self._state = _read_json(directory / PARTIAL)
        if {key: self._state.get(key) for key in origin} != origin:
            self._state = {**origin, "sources": {}}

    def run(self) -> None:
        """Make all of it, or go on from the last commit. An attempt that fails before the first one leaves nothing behind."""
        if _read_json(self._directory / "manifest.json").get("config") == self._state["config"]:
            return
        try:
            self._write_corpus()
        except BrokenProcessPool:
            raise RunError(
                f"{self._directory}: a tokenizing process was killed, perhaps for want of memory; run the same command again to go on"
            ) from None
        finally:
            if not self._state["sources"]:
                shutil.rmtree(self._directory, ignore_errors=True)

    def _write_corpus(self) -> None:
        if not self._state["sources"]:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir(parents=True)
            save_tokenizer(_make_tokenizer(self._config, self._report), self._directory / "tokenizer")
        self._tokenizer = load_tokenizer(self._directory / "tokenizer")
        with contextlib.ExitStack() as stack:
            num_workers = self._config.num_workers
            self._pool = (
                stack.enter_context(open_pool(num_workers, num_threads=1)) if num_workers > 1 else None
            )
            for source in self._config.sources:
                self._write_source(source)
        records = self._state["sources"]
        manifest = {
            "config": self._state["config"],
            "python": self._state["python"],
            "vocab_size": len(self._tokenizer),
            "sources": {name: {side: record[side] for side in SIDES} for name, record in records.items()},
        }
        write_json(self._directory / "manifest.json", manifest)

    def _write_source(self, source: SourceConfig) -> None:
        record = self._state["sources"].get(source.name, {"documents_read": 0, "bytes_read": 0})
        if record.get("is_finished"):
            return
        directory = self._directory / "sources" / source.name
        directory.mkdir(parents=True, exist_ok=True)
        dtype = token_dtype(len(self._tokenizer))
        with contextlib.ExitStack() as stack:
            writers: list[DocumentWriter] = []
            for side in SIDES:
                writer = stack.enter_context(DocumentWriter(directory, side, dtype, record.get(side)))
                record[side] = writer.record
                writers.append(writer)
            self._append_documents(source, record, writers)
            for writer in writers:
                writer.finish()
        self._commit(source, record | {"is_finished": True})

    def _append_documents(
        self, source: SourceConfig, record: dict[str, Any], writers: Sequence[DocumentWriter]
    ) -> None:
        """Tokenize the rest of a source. Held-out documents are distinct: copies of one would count it several times."""
        held_out_ids = writers[1].read_ids()
        num_committed = sum(writer.record["tokens"] for writer in writers)
        with contextlib.closing(read_documents(source, self._config)) as documents:
            unread = itertools.islice(documents, record["documents_read"], None)
            for batch, tokenized in self._tokenize(source, _batched(unread)):
                for (document, held_out), token_ids in zip(batch, tokenized, strict=True):
                    num_bytes = len(document.text.encode())
                    record["documents_read"] += 1
                    record["bytes_read"] += num_bytes
                    if held_out and document.id in held_out_ids:
                        continue
                    if held_out:
                        held_out_ids.add(document.id)
                    writers[held_out].append(token_ids, num_bytes=num_bytes, text_id=document.id)
                num_tokens = sum(writer.record["tokens"] for writer in writers)
                if num_tokens - num_committed >= COMMIT_TOKENS:
                    for writer in writers:
                        writer.sync()
                    self._commit(source, record)
                    num_committed = num_tokens
                self._report(source.name, record["bytes_read"])

    def _commit(self, source: SourceConfig, record: dict[str, Any]) -> None:
        sources = {**self._state["sources"], source.name: record}
        write_json(self._directory / PARTIAL, {**self._state, "sources": sources})
        self._state["sources"] = sources

    def _tokenize(
        self, source: SourceConfig, batches: Iterator[Batch]
    ) -> Iterator[tuple[Batch, list[np.ndarray]]]:
        """Batches in their order, with the token ids of each document; the workers are some batches ahead."""
        pool = None if source.kind == "megatron" else self._pool  # ids are framed sooner than they are sent
        if pool is None:
            for batch in batches:
                yield batch, _token_ids(self._tokenizer, batch)
            return
        ahead: deque[tuple[Batch, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
        for batch in batches:
            ahead.append((batch, pool.submit(_token_ids_apart, self._directory / "tokenizer", batch)))
            if len(ahead) > 2 * self._config.num_workers:
                yield _collected(pool, *ahead.popleft())
        while ahead:
            yield _collected(pool, *ahead.popleft())


def _token_ids(tokenizer: PreTrainedTokenizerFast, batch: Batch) -> list[np.ndarray]:
    given = [document.token_ids for document, _ in batch if document.token_ids is not None]
    if given:  # all documents of a source come tokenized, or none
        return frame_documents(tokenizer, given)
    return encode_documents(tokenizer, [document.text for document, _ in batch])


def _token_ids_apart(tokenizer: Path, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a batch, concatenated, and where each document but the first begins: quicker to send than many arrays."""
    documents = _token_ids(_worker_tokenizer(tokenizer), batch)
    return np.concatenate(documents), np.cumsum([len(ids) for ids in documents[:-1]], dtype=np.int64)


@functools.cache
def _worker_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    return load_tokenizer(directory)


def _collected(
    pool: Pool, batch: Batch, future: Future[tuple[np.ndarray, np.ndarray]]
) -> tuple[Batch, list[np.ndarray]]:
    while not pool.wait([future]):
        pass
    return batch, np.split(*future.result())


def _make_tokenizer(config: DataConfig, progress: Progress) -> PreTrainedTokenizerFast:
    if config.tokenizer.path is not None:
        return load_tokenizer(config_path(config.tokenizer.path, config))
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


def _batched(documents: Iterator[tuple[Document, bool]]) -> Iterator[Batch]:
    """Documents in batches large enough to keep the tokenizer busy and small enough to hold in memory."""
    size = 0

    def batch_number(item: tuple[Document, bool]) -> int:
        nonlocal size
        size += len(item[0].text)
        return size // BATCH_CHARACTERS

    for _, group in itertools.groupby(documents, key=batch_number):
        yield list(group)
