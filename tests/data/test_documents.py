"""Readers of every kind of source, and one clear line for each kind of bad input."""

from __future__ import annotations

import gzip
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlprior.config import RunError, UsageError, decode
from rlprior.data.config import DataConfig, SourceConfig, template_fields
from rlprior.data.documents import Document, read_documents, source_files
from rlprior.tasks.config import TaskConfig


def read(source: SourceConfig, data_dir: Path | None = None, **settings: Any) -> list[tuple[Document, bool]]:
    config = DataConfig(sources=(source,), data_dir=str(data_dir) if data_dir else None, **settings)
    return list(read_documents(source, config))


def texts(source: SourceConfig, data_dir: Path | None = None) -> list[str]:
    return [document.text for document, _ in read(source, data_dir)]


def write_records(path: Path, *records: dict[str, Any]) -> None:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


# Kinds of sources


def test_text_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}\r\n", newline="")
    (tmp_path / "folder.txt").mkdir()
    source = SourceConfig(name="s", kind="text", path="*.txt")
    assert texts(source, tmp_path) == ["text a\r\n", "text b\r\n", "text c\r\n"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("bracket")
    assert texts(SourceConfig(name="s", kind="text", path="a[1].txt"), tmp_path) == ["bracket"]


def test_headings_start_documents_and_every_byte_is_kept(tmp_path: Path) -> None:
    content = "preface\n = One = \ntext\n = = Sub = = \nmore\n = Two = \nend"
    (tmp_path / "wiki.txt").write_text(content)
    source = SourceConfig(name="s", kind="text", path="wiki.txt", document_start="^ = [^=].* = $")
    found = texts(source, tmp_path)
    assert [text.splitlines()[0] for text in found] == ["preface", " = One = ", " = Two = "]
    assert "".join(found) == content


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_json_lines_through_a_template(tmp_path: Path, name: str) -> None:
    write_records(tmp_path / name, {"q": "1+1", "a": "<<1+1=2>>2", "n": 1}, {"q": "{x}", "a": "é", "n": 2.5})
    source = SourceConfig(
        name="s", kind="jsonl", path=name, template="{n}. {q} {{}}\n{a}", strip_pattern="<<[^>]*>>"
    )
    assert texts(source, tmp_path) == ["1. 1+1 {}\n2", "2.5. {x} {}\né"]


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "other": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    source = SourceConfig(name="s", kind="parquet", path="*.parquet", template="{text}/{other}")
    assert texts(source, tmp_path) == ["one/1", "two/2"]


def test_hub_data_set_from_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_records(tmp_path / "set" / "train.jsonl", {"text": "one"}, {"text": "two"})
    source = SourceConfig(name="s", kind="hub", path="set")
    assert texts(source, tmp_path) == ["one", "two"]
    with pytest.raises(UsageError, match=r"set:1: no field 'body'; it has 'text'"):
        texts(SourceConfig(name="s", kind="hub", path="set", template="{body}"), tmp_path)


@pytest.fixture
def hub_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as it lies on the hub: two subsets of parquet shards, named by the front matter of its card."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "set"
    configs: list[dict[str, Any]] = []
    for subset in ("small", "large"):
        (root / subset).mkdir(parents=True)
        for split in ("train", "test"):
            for shard in range(2):
                table = pa.table({"text": [f"{subset} {split} {shard}{row}" for row in range(3)]})
                parquet.write_table(table, root / subset / f"{split}-0000{shard}-of-00002.parquet")
        files = [{"split": split, "path": f"{subset}/{split}-*"} for split in ("train", "test")]
        configs.append({"config_name": subset, "data_files": files})
    # JSON is YAML
    (root / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n# A data set\n")
    return root


@pytest.mark.parametrize(("subset", "split"), [("small", "train"), ("large", "test")])
def test_hub_subsets_and_splits(hub_layout: Path, subset: str, split: str) -> None:
    source = SourceConfig(name="s", kind="hub", path="set", hub_subset=subset, hub_split=split)
    expected = [f"{subset} {split} {shard}{row}" for shard in range(2) for row in range(3)]
    assert texts(source, hub_layout.parent) == expected


def test_hub_is_streamed(hub_layout: Path) -> None:
    """No file is opened before its rows are needed: a broken one is met only by who reads so far."""
    (hub_layout / "small" / "train-00001-of-00002.parquet").write_bytes(b"not parquet")
    source = SourceConfig(name="s", kind="hub", path="set", hub_subset="small", max_bytes=30)
    assert texts(source, hub_layout.parent) == ["small train 00", "small train 01", "small train 02"]
    with pytest.raises(RunError, match="data set 'set' could not be read from the hub: ") as raised:
        texts(replace(source, max_bytes=None), hub_layout.parent)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"hub_subset": "huge"}, "huge"), ({"hub_subset": "small", "hub_split": "dev"}, "dev")],
)
def test_a_hub_subset_or_split_that_is_not_there(
    hub_layout: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=f"could not be read from the hub: .*{message}"):
        texts(SourceConfig(name="s", kind="hub", path="set", **settings), hub_layout.parent)


def test_problem_file(tmp_path: Path) -> None:
    write_records(tmp_path / "p.jsonl", {"question": "1+1", "answer": "1+1 = <<1+1=2>>2\n#### 2"})
    source = SourceConfig(name="s", kind="problems", problems=TaskConfig(kind="file", path="p.jsonl"))
    assert texts(source, tmp_path) == ["Q: 1+1\nA: 1+1 = 2\n#### 2"]


def test_generated_problems_are_trained_on_one_side_and_held_out_from_the_other() -> None:
    def problems(**settings: Any) -> list[tuple[Document, bool]]:
        return read(
            SourceConfig(name="s", kind="problems", problems=TaskConfig(), num_problems=2000, **settings)
        )

    both = problems()
    sides = [
        {document.split_key for document, held_out in both if held_out is side} for side in (False, True)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert sum(not held_out for _, held_out in both) == 2000
    assert sum(held_out for _, held_out in both) == 100
    assert {held_out for _, held_out in problems(held_out="none")} == {False}
    assert {held_out for _, held_out in problems(held_out="all")} == {True}


# Rules


def test_max_bytes_ends_after_the_document_that_reaches_it(tmp_path: Path) -> None:
    write_records(tmp_path / "r.jsonl", *({"text": "ab"} for _ in range(5)))
    for max_bytes, expected in ((1, 1), (2, 1), (3, 2), (100, 5)):
        source = SourceConfig(name="s", kind="jsonl", path="r.jsonl", max_bytes=max_bytes)
        assert len(texts(source, tmp_path)) == expected


def test_hash_holds_out_its_share_and_copies_together(tmp_path: Path) -> None:
    write_records(tmp_path / "r.jsonl", *({"text": f"text {i % 4000}"} for i in range(8000)))
    source = SourceConfig(name="s", kind="jsonl", path="r.jsonl")
    sides: dict[str, set[bool]] = {}
    for document, held_out in read(source, tmp_path, held_out_fraction=0.2):
        sides.setdefault(document.text, set()).add(held_out)
    assert all(len(found) == 1 for found in sides.values())
    share = sum(True in found for found in sides.values()) / 4000
    # 4000 draws of 0.2 have a standard deviation of 0.0063: five of them.
    assert abs(share - 0.2) < 0.032
    small = {d.text for d, held_out in read(source, tmp_path, held_out_fraction=0.1) if held_out}
    assert small < {text for text, found in sides.items() if True in found}


@pytest.mark.parametrize(("rule", "expected"), [("all", {True}), ("none", {False})])
def test_all_or_none_held_out(tmp_path: Path, rule: Any, expected: set[bool]) -> None:
    write_records(tmp_path / "r.jsonl", *({"text": f"text {i}"} for i in range(100)))
    source = SourceConfig(name="s", kind="jsonl", path="r.jsonl", held_out=rule)
    assert {held_out for _, held_out in read(source, tmp_path)} == expected


# Bad input

GOOD = b'{"text": "fine"}\n'
BAD_RECORDS = [
    (b"", RunError, r"r\.jsonl: the file is empty"),
    (GOOD + b"{oops}\n", RunError, r"r\.jsonl:2: not JSON"),
    (GOOD + b'"text"\n', RunError, r"r\.jsonl:2: not a JSON object"),
    (GOOD + b'{"text": "\x80"}\n', RunError, r"r\.jsonl: byte 27 is not UTF-8"),
    (GOOD + b'{"body": "x", "id": 1}\n', UsageError, r"r\.jsonl:2: no field 'text'; it has 'body', 'id'"),
    (GOOD + b'{"text": ["x"]}\n', RunError, r"r\.jsonl:2: field 'text' must be text, not list"),
    (GOOD + b'{"text": null}\n', RunError, r"r\.jsonl:2: field 'text' must be text, not NoneType"),
    (GOOD + b'{"text": "\\udfff"}\n', RunError, r"r\.jsonl:2: character 0 is half a surrogate pair"),
    (b'{"text": " "}\n', RunError, r"source 's': no documents"),
]


@pytest.mark.parametrize(("content", "error", "message"), BAD_RECORDS)
def test_bad_records(tmp_path: Path, content: bytes, error: type[Exception], message: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        texts(SourceConfig(name="s", kind="jsonl", path="r.jsonl"), tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
@pytest.mark.parametrize("path", ["absent", "absent*"])
def test_missing_files(tmp_path: Path, kind: Any, path: str) -> None:
    with pytest.raises(UsageError, match=r"source 's': .*absent.*: no such file"):
        texts(SourceConfig(name="s", kind=kind, path=path), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b" \n", "the file is empty"), (b"ab\xffc", "byte 2 is not UTF-8")],
)
def test_bad_text_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(RunError, match=f"t.txt: {message}"):
        texts(SourceConfig(name="s", kind="text", path="t.txt"), tmp_path)


def test_bad_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    source = SourceConfig(name="s", kind="parquet", path="a.parquet")
    path.write_bytes(b"not parquet at all")
    with pytest.raises(RunError, match=r"a\.parquet: not a readable parquet file"):
        texts(source, tmp_path)
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(RunError, match=r"a\.parquet: the file is empty"):
        texts(source, tmp_path)
    parquet.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(UsageError, match=r"a\.parquet: no field 'text'; it has 'body'"):
        texts(source, tmp_path)


@pytest.mark.parametrize(
    ("kind", "module", "extra"), [("parquet", "pyarrow", "parquet"), ("hub", "datasets", "hub")]
)
def test_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, module: str, extra: str
) -> None:
    (tmp_path / "f").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=re.escape(f"pip install 'rlprior[{extra}]'")):
        texts(SourceConfig(name="s", kind=kind, path="f"), tmp_path)


def test_unreachable_hub_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    source = SourceConfig(name="s", kind="hub", path="someone/something")
    with pytest.raises(
        RunError, match=r"data set 'someone/something' could not be read from the hub: Couldn't"
    ) as raised:
        texts(source, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"name": "a/b", "kind": "embedded_code"}, "name = 'a/b' must be letters"),
        ({"name": "s", "kind": "text"}, "path is missing; add it for kind 'text'"),
        (
            {"name": "s", "kind": "embedded_code", "path": "x"},
            "path is not used; remove it for kind 'embedded_code'",
        ),
        ({"name": "s", "kind": "problems"}, "problems belongs to kind 'problems'"),
        ({"name": "s", "kind": "problems", "problems": {}}, "num_problems belongs to generated problems"),
        (
            {"name": "s", "kind": "embedded_code", "num_problems": 5},
            "num_problems belongs to generated problems",
        ),
        ({"name": "s", "kind": "embedded_code", "max_bytes": 0}, "max_bytes = 0 must be at least 1"),
        (
            {"name": "s", "kind": "embedded_code", "strip_pattern": "("},
            "strip_pattern = '(' is not a regular expression",
        ),
        (
            {"name": "s", "kind": "jsonl", "path": "x", "template": "text"},
            "template = 'text' must name fields",
        ),
        ({"name": "s", "kind": "jsonl", "path": "x", "template": "{text"}, "template = '{text'"),
        ({"name": "s", "kind": "jsonl", "path": "x", "template": "{a.b}"}, "must name fields as {field}"),
        ({"name": "s", "kind": "jsonl", "path": "x", "template": "{}"}, "must name fields as {field}"),
        ({"name": "s", "kind": "sql"}, "sources.0.kind must be one of"),
        ({"name": "s", "kind": "text", "path": "x", "heldout": "all"}, "did you mean 'held_out'?"),
    ],
)
def test_bad_source_config(source: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        decode(DataConfig, {"sources": [source]}, source="study.toml", where="data")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sources": []}, "sources is empty"),
        ({"held_out_fraction": 0.0}, "held_out_fraction = 0.0 must be between 0 and 1"),
        ({"held_out_fraction": 1.0}, "held_out_fraction = 1.0 must be between 0 and 1"),
        ({"tokenizer": {"vocab_size": 100}}, "vocab_size = 100 must be at least 259"),
        ({"tokenizer": {"max_training_bytes": 0}}, "max_training_bytes = 0 must be at least 1"),
        ({"sources": [{"name": "a", "kind": "embedded_code"}] * 2}, "sources has one name twice"),
    ],
)
def test_bad_data_config(table: dict[str, Any], message: str) -> None:
    complete = {"sources": [{"name": "a", "kind": "embedded_code"}], **table}
    with pytest.raises(UsageError, match=re.escape(message)):
        decode(DataConfig, complete, source="study.toml")


def test_template_fields_can_repeat() -> None:
    assert template_fields("{a}{b}{a}") == ("a", "b", "a")


# Real files


def test_wikitext_articles(real_data: Path) -> None:
    source = SourceConfig(
        name="wiki", kind="text", path="wikitext2/*.txt", document_start="^ = [^=].* = $", held_out="all"
    )
    files = source_files(source, DataConfig(sources=(source,), data_dir=str(real_data)))
    found = texts(source, real_data)
    assert [file.name for file in files] == ["test.txt", "valid.txt"]
    # WikiText-2 has 60 articles in each of these splits; a heading inside an article may look like its title.
    assert 120 <= len(found) <= 125
    assert all(re.match(r" = [^=].* = \n", text) for text in found)
    assert sum(len(t.encode()) for t in found) == pytest.approx(sum(f.stat().st_size for f in files), abs=10)


def test_compressed_exercises(real_data: Path) -> None:
    source = SourceConfig(
        name="x",
        kind="jsonl",
        path="text_openstax/exercises.jsonl.gz",
        template="Q: {problem}\nA: {solution}",
        max_bytes=10_000,
    )
    found = texts(source, real_data)
    assert sum(len(text.encode()) for text in found) >= 10_000
    assert all(text.startswith("Q: ") and "\nA: " in text for text in found)


def test_long_documents_are_split_at_line_ends_and_held_out_ones_keep_their_first_piece(
    tmp_path: Path,
) -> None:
    lines = [f"line {number}\n" for number in range(40)]
    for name in ("a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "f.txt"):
        (tmp_path / name).write_text(name + "\n" + "".join(lines))
    source = SourceConfig(name="t", kind="text", path="*.txt", max_document_bytes=64)
    config = DataConfig(sources=(source,), held_out_fraction=0.5, data_dir=str(tmp_path))
    pieces: dict[str, list[str]] = {}
    sides: dict[str, set[bool]] = {}
    for document, held_out in read_documents(source, config):
        pieces.setdefault(document.split_key, []).append(document.text)
        sides.setdefault(document.split_key, set()).add(held_out)
        assert len(document.text.encode()) <= 64
        assert document.text.endswith("\n")
    assert {side for found in sides.values() for side in found} == {True, False}
    for whole, parts in pieces.items():
        (held_out,) = sides[whole]
        if held_out:
            assert len(parts) == 1
            assert whole.startswith(parts[0])
        else:
            assert "".join(parts) == whole


def test_a_line_longer_than_the_limit_is_a_piece_by_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n" + "y" * 100 + "\nz\n")
    source = SourceConfig(name="t", kind="text", path="a.txt", held_out="none", max_document_bytes=10)
    config = DataConfig(sources=(source,), data_dir=str(tmp_path))
    assert [document.text for document, _ in read_documents(source, config)] == [
        "x\n",
        "y" * 100 + "\n",
        "z\n",
    ]
