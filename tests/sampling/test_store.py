"""The sample store: what a kill, a full disk or another key does to it."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlprior.config import RunError
from rlprior.sampling.store import Sample, SampleStore, StoreKey

KEY = StoreKey(
    model_hash="abc",
    task="addition-1",
    decoding={"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 64},
    seed=3,
)
PROBLEMS = ("p0", "p1", "p2")


def make_sample(problem_id: str, index: int) -> Sample:
    text = f"{problem_id} \n → {index}"
    return Sample(
        problem_id=problem_id,
        sample_index=index,
        token_ids=tuple(range(index + 1)),
        text=text,
        finish_reason="length" if index % 3 == 2 else "stop",
        log_prob_nats=-0.1 * (index + 1),
        num_tokens=index + 1,
    )


def fill(path: Path, *, batch_size: int = 4, num_samples: int = 6) -> SampleStore:
    store = SampleStore.open(path, KEY)
    while missing := store.missing(PROBLEMS, num_samples):
        store.append([make_sample(*place) for place in missing[:batch_size]])
    return store


def test_round_trip(tmp_path: Path) -> None:
    fill(tmp_path / "s.jsonl")
    pool = SampleStore.open(tmp_path / "s.jsonl", KEY).pool(PROBLEMS, 6)
    assert pool == [[make_sample(problem, i) for i in range(6)] for problem in PROBLEMS]


def test_header_comes_first_and_names_the_key(tmp_path: Path) -> None:
    fill(tmp_path / "s.jsonl")
    header = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])
    assert header["key"] == {
        "model_hash": "abc",
        "task": "addition-1",
        "decoding": {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 64},
        "seed": 3,
    }


@pytest.mark.slow
def test_a_kill_at_any_byte_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole = (fill(tmp_path / "whole.jsonl").path).read_bytes()
    killed = tmp_path / "killed.jsonl"
    for length in range(len(whole)):
        killed.write_bytes(whole[:length])
        fill(killed)
        assert killed.read_bytes() == whole, f"killed after {length} bytes"


def test_missing_names_what_is_left_in_order(tmp_path: Path) -> None:
    store = SampleStore.open(tmp_path / "s.jsonl", KEY)
    store.append([make_sample("p1", 0), make_sample("p0", 1)])
    assert store.missing(("p1", "p0"), 2) == [("p1", 1), ("p0", 0)]


def test_a_short_pool_is_refused(tmp_path: Path) -> None:
    store = fill(tmp_path / "s.jsonl", num_samples=2)
    with pytest.raises(RunError, match=r"3 of 9 samples are missing.*sample 2 of problem p0"):
        store.pool(PROBLEMS, 3)
    assert len(store.pool(PROBLEMS, 1)[0]) == 1


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(KEY, seed=4), "seed"),
        (replace(KEY, model_hash="x"), "model_hash"),
        (replace(KEY, task="addition-2"), "task"),
        (replace(KEY, decoding={**KEY.decoding, "top_p": 1.0}), "decoding.top_p"),
        (replace(KEY, decoding={**KEY.decoding, "min_p": 0.1}), "decoding.min_p"),
    ],
)
def test_another_key_is_refused_and_nothing_is_lost(tmp_path: Path, other: StoreKey, named: str) -> None:
    path = fill(tmp_path / "s.jsonl").path
    before = path.read_bytes()
    with pytest.raises(RunError, match=re.escape(named)):
        SampleStore.open(path, other)
    assert path.read_bytes() == before


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = fill(tmp_path / "s.jsonl").path
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\x00" * 10 + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=r"s\.jsonl:2: not a line"):
        SampleStore.open(path, KEY)


@pytest.mark.parametrize("batch", [["p0"], ["p1", "p1"]])
def test_a_repeated_sample_is_refused_before_writing(tmp_path: Path, batch: list[str]) -> None:
    store = SampleStore.open(tmp_path / "s.jsonl", KEY)
    store.append([make_sample("p0", 0)])
    before = store.path.read_bytes()
    with pytest.raises(ValueError, match="already"):
        store.append([make_sample(problem, 0) for problem in batch])
    assert store.path.read_bytes() == before


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path / "s.jsonl", num_samples=1)
    before = store.path.read_bytes()

    class HalfFullFile(io.FileIO):
        """Takes half of what it is given, then reports a full disk."""

        num_writes = 0

        def write(self, data, /) -> int:
            self.num_writes += 1
            if self.num_writes > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(bytes(data)[: len(data) // 2]) or 0

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: HalfFullFile(path, mode))
        with pytest.raises(RunError, match="disk is full"):
            store.append([make_sample("p0", 1)])
    assert store.path.read_bytes() == before
    assert store.missing(("p0",), 2) == [("p0", 1)]
    store.append([make_sample("p0", 1)])
    assert SampleStore.open(store.path, KEY).missing(("p0",), 2) == []


def test_values_that_json_lacks_are_refused(tmp_path: Path) -> None:
    store = SampleStore.open(tmp_path / "s.jsonl", KEY)
    before = store.path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        store.append([replace(make_sample("p0", 0), log_prob_nats=float("nan"))])
    assert store.path.read_bytes() == before
