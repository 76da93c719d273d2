"""Where a benchmark's records come from: files below the data directory, or else the Hugging Face hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError
from rlprior.records import missing_field, read_hub, read_parquet
from rlprior.tasks.files import check_text, read_json_lines, read_lines

_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".tsv", ".parquet", "-*.parquet")


def _itself(row: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (row,)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One split of a data set.

    Attributes:
        repo: on the hub, `owner/name`.
        subset: its configuration there; None where it has one only.
        split: there.
        folder: below the data directory.
        files: other places below the data directory (patterns, without the ending), looked at before the folder in the hub's layout.
        part: what the whole source is a part of the benchmark for (a subtask); empty where records say it or there are no parts.
        records: the records that a stored row stands for: itself, none, or several.
    """

    repo: str
    subset: str | None = None
    split: str
    folder: str
    files: tuple[str, ...] = ()
    part: str = ""
    records: Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]] = _itself

    def local_file(self) -> str:
        """The first place below the data directory where the source is looked for."""
        inner = f"{self.subset}/" if self.part and self.subset else ""
        return f"{(*self.files, f'{self.folder}/{inner}{self.split}')[0]}.jsonl"

    def local_files(self, data_dir: Path) -> list[Path]:
        """Files of the source below `data_dir`, shards in order; none where it is not there."""
        inner = [f"{self.subset}/{self.split}"] if self.subset else []
        whole = [] if self.part else [self.split, f"data/{self.split}"]
        names = [*self.files, *(f"{self.folder}/{name}" for name in (*inner, *whole))]
        found = (sorted(data_dir.glob(name + ending)) for name in names for ending in _ENDINGS)
        return next((files for files in found if files), [])


@dataclass(frozen=True)
class Record:
    """One record and where it stands.

    Attributes:
        fields: by name.
        where: file or data set, and number.
        part: of its source.
    """

    fields: Mapping[str, Any]
    where: str
    part: str = ""

    def __getitem__(self, name: str) -> Any:
        """A field; UsageError where the record has no such field."""
        if name not in self.fields:
            raise missing_field(name, self.fields, self.where)
        return self.fields[name]

    def text(self, *names: str) -> str:
        """The first of these fields that is there, stripped; a number becomes its digits.

        Raises:
            UsageError: there is none of them.
            RunError: it is no text.
        """
        name = next((name for name in names if name in self.fields), names[0])
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RunError(f"{self.where}: field {name!r} must be text, not {type(value).__name__}")
        return check_text(str(value), self.where).strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of texts, each stripped; RunError where it is not."""
        values = self[name]
        if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
            raise RunError(f"{self.where}: field {name!r} must be a list of texts")
        return tuple(check_text(value, self.where).strip() for value in values)

    def wrong(self, name: str, expected: str) -> RunError:
        """The error of a field whose value does not fit."""
        return RunError(f"{self.where}: field {name!r} must be {expected}, not {self[name]!r:.60}")


def read_source(source: Source, data_dir: Path | None) -> Iterator[Record]:
    """Records of a source: from its file below `data_dir` where there is one, or else streamed from the hub.

    Raises:
        UsageError: neither there nor on the hub; says which file or command gives it. An extra that is not installed.
        RunError: a file that cannot be read.
    """
    paths = source.local_files(data_dir) if data_dir else []
    rows = _local_rows(paths) if paths else _hub_rows(source, data_dir)
    empty = True
    for where, row in rows:
        for record in source.records(row):
            empty = False
            yield Record(record, where, source.part)
    if empty:
        raise RunError(f"{paths[0] if paths else source.repo}: no records of {source.folder!r}")


def _hub_rows(source: Source, data_dir: Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        for number, row in read_hub(source.repo, source.subset, source.split):
            yield f"{source.repo}:{number}", row
    except (UsageError, RunError) as error:
        raise UsageError(_how_to_get(source, data_dir, str(error))) from None


def _how_to_get(source: Source, data_dir: Path | None, reason: str) -> str:
    directory = data_dir or "DIR"
    command = f"hf download {source.repo} --repo-type dataset --local-dir {directory}/{source.folder}"
    return (
        f"{reason}; give --data-dir {directory} with {directory}/{source.local_file()}, or run: {command} "
        "(a gated data set: accept its terms on its page and run `hf auth login` first)"
    )


def _local_rows(paths: Iterable[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in paths:
        name = path.name.removesuffix(".gz")
        read = _READERS[Path(name).suffix]
        for number, row in read(path):
            yield f"{path}:{number}", row


def read_json(path: Path) -> Any:
    """The content of a JSON file, `.gz` or not.

    Raises:
        UsageError: there is no such file.
        RunError: it is not JSON.
    """
    try:
        return json.loads("\n".join(line for _, line in read_lines(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RunError(f"{path}: not JSON: {error}") from None


def _read_json_list(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSON file: of its list, or of the one list among an object's values."""
    content = read_json(path)
    lists = [content] if isinstance(content, list) else []
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
    if len(lists) != 1 or not all(isinstance(record, dict) for record in lists[0]):
        raise RunError(f"{path}: needs a list of objects, alone or as one value of an object")
    yield from enumerate(lists[0], start=1)


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = (line + "\n" for _, line in read_lines(path))
    yield from enumerate(csv.DictReader(lines), start=1)


def _read_tsv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = (line for _, line in read_lines(path))
    yield from enumerate(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), start=1)


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": read_json_lines,
    ".json": _read_json_list,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": read_parquet,
}
