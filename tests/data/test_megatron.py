"""Megatron's data sets, from files that these tests write by the format's definition."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprior.config import RunError, UsageError, decode
from rlprior.data.config import DataConfig, SourceConfig, TokenizerConfig
from rlprior.data.corpus import Corpus
from rlprior.data.documents import read_documents
from rlprior.data.megatron import read_megatron
from rlprior.data.prepare import input_files, prepare
from rlprior.data.tokenizer import encode_documents, save_tokenizer, train_tokenizer

INT32, UINT16 = 4, 8
LETTERS = {INT32: "i", UINT16: "H"}
TEXTS = [f"Text {number} of the set says: {'é' * (number % 7)} {number * number}." for number in range(200)]


def write_set(path: Path, documents: Sequence[Sequence[Sequence[int]]], code: int = INT32) -> Path:
    """Write documents, each a list of sequences, byte by byte. Returns the index."""
    sequences = [sequence for document in documents for sequence in document]
    size = struct.calcsize(LETTERS[code])
    borders, offsets = [0], [0]
    for document in documents:
        borders.append(borders[-1] + len(document))
    for sequence in sequences:
        offsets.append(offsets[-1] + size * len(sequence))
    ids = [token for sequence in sequences for token in sequence]
    path.with_suffix(".bin").write_bytes(struct.pack(f"<{len(ids)}{LETTERS[code]}", *ids))
    path.write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(borders))
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *offsets[:-1])
        + struct.pack(f"<{len(borders)}q", *borders)
    )
    return path


SEQUENCES = st.lists(st.lists(st.lists(st.integers(0, 65_535), max_size=5), max_size=4), max_size=8)


@settings(deadline=None)  # files
@given(SEQUENCES, st.sampled_from([INT32, UINT16]))
def test_documents_are_the_sequences_between_two_borders(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], code: int
) -> None:
    path = write_set(tmp_path_factory.mktemp("set") / "a.idx", documents, code)
    found = [ids.tolist() for ids in read_megatron(path)]
    assert found == [list(itertools.chain(*document)) for document in documents]


# Damage

SET = [[[5, 6, 7], [8]], [[9, 10]]]  # 3 sequences, 3 borders: 34 + 3 * 4 + 3 * 8 + 3 * 8 bytes
LENGTHS, OFFSETS, BORDERS, SIZE = 34, 46, 70, 94


def overwrite(position: int, form: str, value: int) -> Callable[[bytes], bytes]:
    new = struct.pack(form, value)
    return lambda content: content[:position] + new + content[position + len(new) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "not a Megatron index: it does not begin with MMIDIDX"),
        (lambda content: b"PAR1" + content[4:], "not a Megatron index"),
        (lambda content: content[:20], "the Megatron index is damaged: its header is cut off"),
        (overwrite(9, "<Q", 2), "version 2 of Megatron's index; only version 1"),
        (overwrite(17, "<B", 7), "ids of type code 7; only 4 \\(int32\\) and 8 \\(uint16\\)"),
        (overwrite(17, "<B", 0), "ids of type code 0"),
        (overwrite(17, "<B", UINT16), "its sequences do not follow each other"),
        (overwrite(18, "<Q", 2**62), "its header promises .* bytes, and it has 94"),
        (lambda content: content[:-1], "its header promises 94 bytes, and it has 93"),
        (lambda content: content + b"\0" * 8, "its header promises 94 bytes, and it has 102"),
        (lambda content: content + b"\0" * 3, "a multimodal data set"),
        (overwrite(LENGTHS, "<i", -3), "its sequences do not follow each other"),
        (overwrite(LENGTHS, "<i", 4), "its sequences do not follow each other"),
        (
            lambda content: overwrite(LENGTHS + 4, "<q", (4 << 32) + 2**32 - 1)(  # lengths 3, -1, 4
                overwrite(OFFSETS + 16, "<q", 8)(content)
            ),
            "its sequences do not follow each other",
        ),
        (overwrite(LENGTHS + 8, "<i", 3), "it describes 28 bytes of ids, and a.bin has 24"),
        (overwrite(OFFSETS, "<q", 4), "its sequences do not follow each other"),
        (overwrite(OFFSETS + 8, "<q", 0), "its sequences do not follow each other"),
        (overwrite(BORDERS, "<q", 1), "its document borders do not cover its sequences"),
        (overwrite(BORDERS + 8, "<q", 4), "its document borders do not cover its sequences"),
        (overwrite(BORDERS + 8, "<q", -1), "its document borders do not cover its sequences"),
        (overwrite(BORDERS + 16, "<q", 2), "its document borders do not cover its sequences"),
    ],
)
def test_a_damaged_index_is_one_clear_line(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = write_set(tmp_path / "a.idx", SET)
    assert len(path.read_bytes()) == SIZE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RunError, match=message) as raised:
        list(read_megatron(path))
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("num_bytes", [0, 23, 25, 28])
def test_ids_that_are_cut_off_are_noticed(tmp_path: Path, num_bytes: int) -> None:
    path = write_set(tmp_path / "a.idx", SET)
    content = path.with_suffix(".bin").read_bytes() + b"\0" * 10
    path.with_suffix(".bin").write_bytes(content[:num_bytes])
    with pytest.raises(RunError, match=f"it describes 24 bytes of ids, and a.bin has {num_bytes}"):
        list(read_megatron(path))


def test_both_files_are_needed_and_named_by_the_index(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.idx", SET)
    with pytest.raises(UsageError, match=r"a\.bin: not a Megatron index; name the \.idx file"):
        list(read_megatron(path.with_suffix(".bin")))
    path.with_suffix(".bin").unlink()
    with pytest.raises(
        UsageError, match=r"a\.bin: no such file; a Megatron data set is an \.idx and a \.bin"
    ):
        list(read_megatron(path))


# As a source


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    tokenizer = train_tokenizer(TEXTS, 400)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    return tokenizer


def set_config(tmp_path: Path, **settings: Any) -> DataConfig:
    source = SourceConfig(name="s", kind="megatron", path="*.idx", **settings)
    return DataConfig(
        sources=(source,),
        tokenizer=TokenizerConfig(path="tokenizer"),
        held_out_fraction=0.2,
        data_dir=str(tmp_path),
    )


# As Megatron's preprocessing writes it (the text, and <|eos|> where it was asked for), and with a first token too.
@pytest.mark.parametrize(("first", "last"), [(1, -1), (1, None), (0, None)])
@pytest.mark.parametrize("code", [INT32, UINT16])
def test_the_corpus_is_that_of_the_same_texts(
    tmp_path: Path, tokenizer: Any, first: int, last: int | None, code: int
) -> None:
    ids = [document[first:last].tolist() for document in encode_documents(tokenizer, TEXTS)]
    write_set(tmp_path / "a.idx", [[document[:3], document[3:]] for document in ids[:150]], code)
    write_set(tmp_path / "b.idx", [[document] for document in ids[150:]], code)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = set_config(tmp_path)
    prepare(config, tmp_path / "from-ids")
    source = SourceConfig(name="s", kind="jsonl", path="t.jsonl")
    prepare(replace(config, sources=(source,)), tmp_path / "from-text")
    folders = [tmp_path / name / "sources" / "s" for name in ("from-ids", "from-text")]
    one, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert one == other
    assert len(Corpus.open(tmp_path / "from-ids").sources["s"].held_out) > 0


def test_both_files_are_inputs(tmp_path: Path, tokenizer: Any) -> None:
    write_set(tmp_path / "a.idx", SET)
    assert set(input_files(set_config(tmp_path)).values()) == {
        tmp_path / name for name in ("a.idx", "a.bin", "tokenizer")
    }


def test_empty_documents_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    ids = encode_documents(tokenizer, TEXTS[:1])[0].tolist()
    write_set(tmp_path / "a.idx", [[], [[]], [[eos]], [ids]])
    assert [
        document.text for document, _ in read_documents(set_config(tmp_path).sources[0], set_config(tmp_path))
    ] == TEXTS[:1]
    write_set(tmp_path / "a.idx", [])
    with pytest.raises(RunError, match="source 's': no documents"):
        prepare(set_config(tmp_path), tmp_path / "corpus")


def test_max_bytes_counts_the_bytes_of_the_text(tmp_path: Path, tokenizer: Any) -> None:
    ids = [document.tolist() for document in encode_documents(tokenizer, TEXTS)]
    write_set(tmp_path / "a.idx", [[document] for document in ids])
    config = set_config(tmp_path, max_bytes=len(TEXTS[0].encode()) + 1)
    assert len(list(read_documents(config.sources[0], config))) == 2


@pytest.mark.parametrize("token", [281, -1, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path, tokenizer: Any, token: int) -> None:
    assert len(tokenizer) == 281
    write_set(tmp_path / "a.idx", [[[5, 6]], [[7, token, 8]]])
    with pytest.raises(
        RunError,
        match=rf"a\.idx: document 2: token {token} is not in the vocabulary of 281; give `tokenizer.path`",
    ):
        prepare(set_config(tmp_path), tmp_path / "corpus")


@pytest.mark.parametrize(
    ("source", "tokenizer_path", "message"),
    [
        ({}, None, "source 's' has token ids; name their tokenizer in tokenizer.path"),
        ({"strip_pattern": "x"}, "t", "strip_pattern changes the text, and kind 'megatron' has token ids"),
        ({"document_start": "x"}, "t", "document_start changes the text"),
        (
            {"max_document_bytes": 9},
            "t",
            "max_document_bytes cuts the text, and kind 'megatron' has token ids",
        ),
    ],
)
def test_settings_that_do_not_fit_token_ids(
    source: dict[str, Any], tokenizer_path: str | None, message: str
) -> None:
    table = {"sources": [{"name": "s", "kind": "megatron", "path": "*.idx", **source}]}
    if tokenizer_path:
        table["tokenizer"] = {"path": tokenizer_path}  # type: ignore[assignment]
    with pytest.raises(UsageError, match=message):
        decode(DataConfig, table, source="study.toml")
