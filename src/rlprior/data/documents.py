"""Documents of every kind of source, each with the side of the held-out split it is on."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlprior.config import RunError, UsageError
from rlprior.data.config import DataConfig, SourceConfig, template_fields
from rlprior.data.embedded import read_code, read_english
from rlprior.data.megatron import megatron_files, read_megatron
from rlprior.data.tokenizer import decode_documents, load_tokenizer
from rlprior.records import missing_field, read_hub, read_parquet
from rlprior.tasks.config import TaskConfig, data_folder, load_task, resolve_path
from rlprior.tasks.files import check_text, read_json_lines
from rlprior.tasks.problem import Problem
from rlprior.tasks.synthetic import Split, generate_problems

DECODED_DOCUMENTS = 1000


@dataclass(frozen=True)
class Document:
    """One text of a source.

    Attributes:
        source: name of the source.
        text: any Unicode text, not blank.
        split_key: what the held-out split hashes: documents with one key land on one side.
        token_ids: of a source that comes tokenized; None where `text` is still to be.
    """

    source: str
    text: str
    split_key: str
    token_ids: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the text: copies share it."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def read_documents(source: SourceConfig, config: DataConfig) -> Generator[tuple[Document, bool], None, None]:
    """Documents of a source in a fixed order, and whether each is held out.

    With `held_out = "hash"` a document is held out where the first 32 bits of its split key's SHA-256 are below
    `held_out_fraction` of their range: a property of the text, the same in every corpus. Generated problems use their own
    split instead: training text from its training side, held-out text from its test side.

    Raises:
        UsageError: a path that names no file, a missing field, or an extra that is not installed.
        RunError: content that cannot be used, with file and line or byte; no documents at all.
    """
    num_bytes, num_documents = 0, 0
    for document, held_out in _read_sides(source, config):
        if not document.text.strip():
            continue
        yield document, held_out
        num_documents += 1
        num_bytes += len(document.text.encode())
        if source.max_bytes is not None and num_bytes >= source.max_bytes:
            break
    if num_documents == 0:
        raise RunError(f"source {source.name!r}: no documents; check its path and template")


def _read_sides(source: SourceConfig, config: DataConfig) -> Iterator[tuple[Document, bool]]:
    if source.problems is not None and source.problems.kind == "synthetic":
        yield from _generated_problems(source, source.problems, config)
        return
    if source.kind == "megatron":
        for text, token_ids in _read_tokenized(source, config):
            yield (
                Document(source.name, text, text, token_ids),
                _is_held_out(text, source, config.held_out_fraction),
            )
        return
    for text, key in _read_texts(source, config):
        text = _stripped(text, source)
        split_key = text if key is None else key
        held_out = _is_held_out(split_key, source, config.held_out_fraction)
        pieces = _pieces(text, source.max_document_bytes)
        for piece in itertools.islice(pieces, 1) if held_out else pieces:
            yield Document(source.name, piece, split_key), held_out


def _stripped(text: str, source: SourceConfig) -> str:
    return re.sub(source.strip_pattern, "", text) if source.strip_pattern else text


def _pieces(text: str, max_bytes: int | None) -> Iterator[str]:
    """`text` cut at line ends into runs of at most `max_bytes`; a longer line is a piece by itself."""
    if max_bytes is None or len(text.encode()) <= max_bytes:
        yield text
        return
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        length = len(line.encode())
        if lines and size + length > max_bytes:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += length
    yield "".join(lines)


def _is_held_out(split_key: str, source: SourceConfig, fraction: float) -> bool:
    if source.held_out != "hash":
        return source.held_out == "all"
    digest = hashlib.sha256(split_key.encode()).digest()
    return int.from_bytes(digest[:4], "big") < fraction * 2**32


def _generated_problems(
    source: SourceConfig, task: TaskConfig, config: DataConfig
) -> Iterator[tuple[Document, bool]]:
    num_train = source.num_problems or 0
    sides: list[tuple[Split, int]] = []
    if source.held_out != "none":
        sides.append(("test", max(1, round(num_train * config.held_out_fraction))))
    if source.held_out != "all":
        sides.append(("train", num_train))
    for split, num_problems in sides:
        for problem in generate_problems(
            families=task.families,
            difficulties=task.difficulties,
            num_problems=num_problems if task.limit is None else min(num_problems, task.limit),
            split=split,
            seed=config.seed,
            unique=False,
        ):
            yield Document(source.name, _stripped(problem.text, source), problem.id), split == "test"


def _read_texts(source: SourceConfig, config: DataConfig) -> Iterator[tuple[str, str | None]]:
    """Texts of any source but generated problems, and their split keys where that is not the text itself."""
    if source.kind == "embedded_english":
        yield from read_english()
    elif source.kind == "embedded_code":
        yield from read_code()
    elif source.problems is not None:
        yield from ((problem.text, None) for problem in _file_problems(source.problems, config))
    elif source.kind == "text":
        for path in source_files(source, config):
            yield from ((text, None) for text in _read_text_file(path, source.document_start))
    else:
        fields = template_fields(source.template)
        for where, record in _read_records(source, config, fields):
            yield fill_template(source.template, fields, record, where), None


def _read_tokenized(source: SourceConfig, config: DataConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Texts and token ids of documents that come tokenized."""
    assert config.tokenizer.path is not None
    tokenizer = load_tokenizer(config_path(config.tokenizer.path, config))
    for path in source_files(source, config):
        if path.suffix != ".idx":
            continue  # the token ids, which source_files names beside their index
        documents = enumerate(read_megatron(path), start=1)
        while batch := list(itertools.islice(documents, DECODED_DOCUMENTS)):
            for number, token_ids in batch:
                _check_vocabulary(token_ids, len(tokenizer), f"{path}: document {number}")
            token_ids = [document for _, document in batch]
            yield from zip(decode_documents(tokenizer, token_ids), token_ids, strict=True)


def _check_vocabulary(token_ids: np.ndarray, vocab_size: int, where: str) -> None:
    if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        wrong = token_ids[(token_ids < 0) | (token_ids >= vocab_size)][0]
        raise RunError(
            f"{where}: token {wrong} is not in the vocabulary of {vocab_size}; give `tokenizer.path` the tokenizer it was made with"
        )


def _file_problems(task: TaskConfig, config: DataConfig) -> list[Problem]:
    data_dir = data_folder(config.data_dir)
    return load_task(task, split="train", num_problems=None, seed=config.seed, data_dir=data_dir)


def config_path(path: str, config: DataConfig) -> Path:
    """A path of the config, which may be relative to its data directory."""
    return resolve_path(path, data_folder(config.data_dir))


def source_files(source: SourceConfig, config: DataConfig) -> list[Path]:
    """Files that a source is read from, in order; none for the kinds that read no files of the user's.

    Raises:
        UsageError: the path names no file.
    """
    if source.problems is not None and source.problems.path:
        return [config_path(source.problems.path, config)]
    if source.path is None or source.kind == "hub":
        return []
    pattern = config_path(source.path, config)
    matches = [pattern]
    if not pattern.is_file():
        matches = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    files = [file for file in matches if file.is_file()]
    if not files:
        raise UsageError(
            f"source {source.name!r}: {pattern}: no such file; correct `path` or the data directory"
        )
    return [part for file in files for part in megatron_files(file)] if source.kind == "megatron" else files


def _read_text_file(path: Path, document_start: str | None) -> Iterator[str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not text.strip():
        raise RunError(f"{path}: the file is empty; it needs text")
    starts = (
        [match.start() for match in re.finditer(document_start, text, re.MULTILINE)] if document_start else []
    )
    borders = sorted({0, *starts, len(text)})
    yield from (text[start:stop] for start, stop in itertools.pairwise(borders))


def _read_records(
    source: SourceConfig, config: DataConfig, fields: tuple[str, ...]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each record is, and the record."""
    if source.kind == "hub":
        yield from _read_hub(source, config)
        return
    readers: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
        "jsonl": read_json_lines,
        "parquet": lambda path: read_parquet(path, fields),
    }
    for path in source_files(source, config):
        for number, record in readers[source.kind](path):
            yield f"{path}:{number}", record


def _read_hub(source: SourceConfig, config: DataConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    identity = source.path or ""
    local = config_path(identity, config)
    folder = local if local.exists() else None
    try:
        for number, record in read_hub(identity, source.hub_subset, source.hub_split, folder=folder):
            yield f"{identity}:{number}", record
    except (UsageError, RunError) as error:
        raise type(error)(f"source {source.name!r}: {error}") from None


def fill_template(template: str, fields: tuple[str, ...], record: Mapping[str, Any], where: str) -> str:
    """Text of a record.

    Raises:
        UsageError: the record has no such field; names those it has.
        RunError: a field that is neither text nor a number.

    >>> fill_template("Q: {q}", ("q",), {"q": "1+1"}, "file:1")
    'Q: 1+1'
    """
    for name in fields:
        if name not in record:
            raise missing_field(name, record, where)
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RunError(f"{where}: field {name!r} must be text, not {type(value).__name__}")
    return check_text(template.format_map(record), where)
