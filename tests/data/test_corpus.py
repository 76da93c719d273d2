"""The files of a corpus: appended to, gone on with, cut into shards, counted."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprior.config import RunError
from rlprior.data import corpus
from rlprior.data.corpus import DocumentWriter, SideRecord, TokenizedDocuments

DTYPE = np.dtype(np.uint16)


def document(number: int) -> np.ndarray:
    """Document of 2 to 6 tokens."""
    return np.arange(number, number + 2 + number % 5, dtype=DTYPE) % 97


def append(writer: DocumentWriter, numbers: range) -> None:
    for number in numbers:
        writer.append(document(number), num_bytes=10 * number, text_id=f"{number:016x}")


def write(directory: Path, num_documents: int) -> SideRecord:
    directory.mkdir(parents=True)
    with DocumentWriter(directory, "train", DTYPE) as writer:
        append(writer, range(num_documents))
        writer.finish()
    return writer.record


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("num_documents", [0, 1, 100])
def test_what_was_appended_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_documents: int
) -> None:
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 20)
    record = write(tmp_path / "s", num_documents)
    found = TokenizedDocuments.open(tmp_path / "s", "train")
    expected = [document(number) for number in range(num_documents)]
    assert len(found) == record["documents"] == num_documents
    assert found.num_tokens == record["tokens"] == sum(map(len, expected))
    for number, ids in enumerate(expected):
        assert found.document(number).tolist() == ids.tolist()
        assert found.document(number).dtype == DTYPE
    assert found.num_bytes.tolist() == [10 * number for number in range(num_documents)]
    assert found.ids.tolist() == [f"{number:016x}".encode() for number in range(num_documents)]


def test_shards_are_bounded_and_hold_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 20)
    record = write(tmp_path / "s", 100)
    found = TokenizedDocuments.open(tmp_path / "s", "train")
    sizes = [len(shard) for shard in found.shards]
    assert sizes == [shard["tokens"] for shard in record["shards"]]
    assert max(sizes) <= 20
    assert set(np.cumsum(sizes).tolist()) <= set(found.offsets.tolist())
    # no shard could have taken the first document of the next
    firsts = [len(document(int(np.searchsorted(found.offsets, end)))) for end in np.cumsum(sizes)[:-1]]
    assert all(size + first > 20 for size, first in zip(sizes, firsts, strict=False))
    for number, shard in enumerate(record["shards"]):
        content = (tmp_path / "s" / f"train.tokens-{number:05d}.npy").read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_document_larger_than_a_shard_is_one_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 2)
    write(tmp_path / "s", 10)
    found = TokenizedDocuments.open(tmp_path / "s", "train")
    assert [len(shard) for shard in found.shards] == [len(document(number)) for number in range(10)]


@settings(deadline=None, max_examples=30)  # every shard waits for the disk
@given(num_synced=st.integers(0, 60), num_lost=st.integers(0, 40), is_finished=st.booleans())
def test_going_on_from_a_record_ends_in_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, num_synced: int, num_lost: int, is_finished: bool
) -> None:
    root = tmp_path_factory.mktemp("writer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_TOKENS", 20)
        write(root / "undisturbed", 60 + num_lost)
        directory = root / "killed"
        directory.mkdir()
        with DocumentWriter(directory, "train", DTYPE) as writer:
            append(writer, range(num_synced))
            writer.sync()
            record = copy.deepcopy(writer.record)
            append(writer, range(num_synced, num_synced + num_lost))
            if is_finished:
                writer.finish()
        with DocumentWriter(directory, "train", DTYPE, record) as writer:
            assert writer.read_ids() == {f"{number:016x}" for number in range(num_synced)}
            append(writer, range(num_synced, 60 + num_lost))
            writer.finish()
    assert contents(directory) == contents(root / "undisturbed")


def test_targets_are_counted_without_the_first_token_of_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "COUNTED_TOKENS", 7)
    write(tmp_path / "one", 100)
    counted = Counter(token for number in range(100) for token in document(number)[1:].tolist())
    counts = TokenizedDocuments.open(tmp_path / "one", "train").target_counts(97)
    assert counts.tolist() == [counted[token] for token in range(97)]
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 50)
    write(tmp_path / "many", 100)
    first, *rest = (documents := TokenizedDocuments.open(tmp_path / "many", "train")).shards
    assert rest
    num_documents = int(np.searchsorted(documents.offsets, len(first)))
    counted = Counter(token for number in range(num_documents) for token in document(number)[1:].tolist())
    assert documents.target_counts(97).tolist() == [counted[token] for token in range(97)]


def test_a_missing_shard_is_a_damaged_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 50)
    write(tmp_path / "s", 100)
    (tmp_path / "s" / "train.tokens-00001.npy").unlink()
    with pytest.raises(RunError, match="its train files do not fit together"):
        TokenizedDocuments.open(tmp_path / "s", "train")
