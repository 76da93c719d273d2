"""Packing as a pure function of (seed, row): what is covered, what is masked, in which proportions."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlprior.config import RunError, UsageError
from rlprior.data import packing
from rlprior.data.corpus import Corpus, TokenizedDocuments, TokenizedSource
from rlprior.data.packing import (
    IGNORE_INDEX,
    PackedBatch,
    PackedMixture,
    attention_mask,
    mixture_shares,
    row_schedule,
)
from rlprior.seeding import numpy_generator

BOS, EOS = 0, 1


def documents(lengths: list[int], first_token: int = 2) -> TokenizedDocuments:
    """Documents of these lengths (at least 2: <|bos|> and <|eos|>) in which every other token is used once."""
    parts: list[np.ndarray] = []
    for length in lengths:
        parts.append(np.array([BOS, *range(first_token, first_token + length - 2), EOS]))
        first_token += length - 2
    return TokenizedDocuments(
        shards=(np.concatenate([np.empty(0), *parts]).astype(np.uint16),),
        offsets=np.cumsum([0, *lengths]),
        num_bytes=np.array(lengths, dtype=np.int64),
        ids=np.array([f"{number * 7919 % 1000:016x}" for number in range(len(lengths))], dtype="S16"),
    )


def in_shards(whole: TokenizedDocuments, borders: set[int]) -> TokenizedDocuments:
    """The same documents, a new shard at each of these document numbers."""
    tokens = np.split(whole.shards[0], whole.offsets[sorted(borders)])
    return TokenizedDocuments(tuple(tokens), whole.offsets, whole.num_bytes, whole.ids)


def corpus(**lengths: list[int]) -> Corpus:
    sources = {
        name: TokenizedSource(name, train=documents(sizes), held_out=documents(sizes))
        for name, sizes in lengths.items()
    }
    return Corpus(Path("unused"), sources, {"vocab_size": 65_536})


def rows_equal(left: PackedBatch, right: PackedBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(left).values(), vars(right).values(), strict=True))


LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 5))
def test_every_token_is_an_input_exactly_once_an_epoch(lengths: list[int], T: int, seed: int) -> None:
    num_tokens = sum(lengths)
    mixture = PackedMixture(corpus(a=lengths), {"a": 1}, T, seed)
    # T epochs of N tokens are N rows of T tokens: no row is left over.
    stream = mixture.batch(0, num_tokens).input_ids.flatten().reshape(T, num_tokens)
    everything = Counter(documents(lengths).shards[0].tolist())
    assert all(Counter(epoch.tolist()) == everything for epoch in stream)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 5))
def test_targets_are_the_next_token_of_the_same_document(lengths: list[int], T: int, seed: int) -> None:
    num_rows = 2 * sum(lengths) // T + 1
    batch = PackedMixture(corpus(a=lengths), {"a": 1}, T, seed).batch(0, num_rows)
    inputs, targets = batch.input_ids.flatten().tolist(), batch.targets.flatten().tolist()
    for position, (token, target) in enumerate(zip(inputs, targets, strict=True)):
        assert (target == IGNORE_INDEX) == (token == EOS)
        assert target != BOS
        if target != IGNORE_INDEX and position + 1 < len(inputs):
            assert target == inputs[position + 1]


@given(LENGTHS, st.integers(1, 9), st.integers(0, 5))
def test_documents_and_positions_restart_together_and_attention_stays_inside(
    lengths: list[int], T: int, seed: int
) -> None:
    batch = PackedMixture(corpus(a=lengths), {"a": 1}, T, seed).batch(3, 8)
    mask = attention_mask(batch.document_ids)
    assert mask.shape == (8, 1, T, T)
    for row in range(8):
        tokens = batch.input_ids[row].tolist()
        document, start = 0, 0
        for t, token in enumerate(tokens):
            if token == BOS and t > 0:
                document, start = document + 1, t
            assert batch.document_ids[row, t] == document
            assert batch.position_ids[row, t] == t - start
            assert mask[row, 0, t].tolist() == [start <= key <= t for key in range(T)]


WEIGHTS = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 30), min_size=1)


@given(WEIGHTS)
def test_no_prefix_is_a_whole_row_from_its_proportion(weights: dict[str, int]) -> None:
    shares = list(mixture_shares(weights).values())
    schedule = row_schedule(shares)
    num_sources, period = len(shares), sum(shares)
    bound = Fraction(0) if num_sources == 1 else 1 - Fraction(1, 2 * num_sources - 2)
    counts = [0] * num_sources
    for row, source in enumerate(schedule.tolist(), start=1):
        counts[source] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - Fraction(row * share, period)) <= bound
    assert counts == shares


@given(WEIGHTS, st.integers(0, 10**6), st.integers(1, 200))
def test_any_window_keeps_the_proportions(weights: dict[str, int], first_row: int, num_rows: int) -> None:
    mixture = PackedMixture(corpus(**{name: [3, 4] for name in weights}), weights, 4, seed=0)
    sources = mixture.batch(first_row, num_rows).source_ids.tolist()
    total = sum(weights.values())
    for k, name in enumerate(mixture.names):
        exact = Fraction(weights[name] * num_rows, total)
        # A window is the difference of two prefixes, each at most 1 - 1 / (2K - 2) rows from its proportion.
        bound = 2 - Fraction(1, len(weights) - 1) if len(weights) > 1 else 0
        assert abs(sources.count(k) - exact) <= bound
        assert mixture.rows_before(first_row + num_rows)[k] - mixture.rows_before(first_row)[
            k
        ] == sources.count(k)


@given(st.integers(0, 500), st.integers(1, 20), st.data())
def test_a_batch_depends_on_its_rows_alone(first_row: int, num_rows: int, data: st.DataObject) -> None:
    sources = corpus(a=[5, 3, 9, 2], b=[40], c=[2, 2])
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    cut = data.draw(st.integers(0, num_rows))
    whole = PackedMixture(sources, weights, 7, seed=1).batch(first_row, num_rows)
    used = PackedMixture(sources, weights, 7, seed=1)
    used.batch(1000, 3)
    tail, head = used.batch(first_row + cut, num_rows - cut), used.batch(first_row, cut)
    joined = PackedBatch(
        *(torch.cat(pair) for pair in zip(vars(head).values(), vars(tail).values(), strict=True))
    )
    assert rows_equal(whole, joined)


def test_the_stream_is_all_documents_in_the_order_of_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "READ_DOCUMENTS", 2 * packing.BLOCK_DOCUMENTS)
    lengths = [2 + 7 * number % 11 for number in range(5 * packing.BLOCK_DOCUMENTS + 3)]
    num_rows, T = 3 * sum(lengths) // 13, 13
    found = PackedMixture(corpus(a=lengths), {"a": 1}, T, seed=4).batch(0, num_rows).input_ids
    expected = [
        documents(lengths).document(number)
        for epoch in range(3)
        for number in numpy_generator(4, "documents", "a", epoch).permutation(len(lengths))
    ]
    assert found.flatten().tolist() == np.concatenate(expected)[: num_rows * T].tolist()


@given(LENGTHS, st.sets(st.integers(1, 11)), st.integers(0, 50), st.integers(1, 9))
def test_a_batch_does_not_depend_on_the_shards(
    lengths: list[int], borders: set[int], first_row: int, T: int
) -> None:
    whole = documents(lengths)
    cut = in_shards(whole, {border for border in borders if border < len(lengths)})
    one, other = (
        PackedMixture(
            Corpus(Path("unused"), {"a": TokenizedSource("a", side, side)}, {}), {"a": 1}, T, seed=1
        ).batch(first_row, 4)
        for side in (whole, cut)
    )
    assert rows_equal(one, other)
    assert [cut.document(number).tolist() for number in range(len(lengths))] == [
        whole.document(number).tolist() for number in range(len(lengths))
    ]


def test_a_later_batch_of_the_same_epoch_orders_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of an epoch takes a minute at 500 million documents: ranks that ask for their own rows pay it once."""
    ordered: list[tuple[object, ...]] = []

    def generator(*names: Any) -> np.random.Generator:
        ordered.append(names)
        return numpy_generator(*names)

    monkeypatch.setattr(packing, "numpy_generator", generator)
    mixture = PackedMixture(corpus(a=[5] * 100, b=[5] * 100), {"a": 1, "b": 1}, 10, seed=0)
    num_ranks, rows_of_rank = 4, 2
    for step in range(25):  # 200 rows: two epochs of each source
        mixture.batch(step * num_ranks * rows_of_rank + rows_of_rank, rows_of_rank)
    assert ordered == [(0, "documents", name, epoch) for epoch in (0, 1) for name in "ab"]


def test_order_changes_with_the_epoch_and_the_seed_and_not_with_the_mixture() -> None:
    sources = corpus(a=[4] * 50, b=[4] * 50)
    epochs = [PackedMixture(sources, {"a": 1}, 200, 0).batch(epoch, 1).input_ids for epoch in (0, 1)]
    assert not torch.equal(*epochs)
    other_seed = PackedMixture(sources, {"a": 1}, 200, 1).batch(0, 1).input_ids
    assert not torch.equal(epochs[0], other_seed)
    mixed = PackedMixture(sources, {"b": 3, "a": 1}, 200, 0).batch(0, 8)
    from_a = mixed.input_ids[mixed.source_ids == 1]
    assert torch.equal(from_a[0], epochs[0][0])
    assert torch.equal(from_a[1], epochs[1][0])


def test_batch_shapes_and_types() -> None:
    batch = PackedMixture(corpus(a=[4, 5]), {"a": 1}, 6, 0).batch(2, 3)
    for tensor in (batch.input_ids, batch.targets, batch.position_ids, batch.document_ids):
        assert tensor.shape == (3, 6)
        assert tensor.dtype == torch.int64
    assert batch.source_ids.tolist() == [0, 0, 0]
    assert PackedMixture(corpus(a=[4, 5]), {"a": 1}, 6, 0).batch(2, 0).input_ids.shape == (0, 6)


def test_epochs_counts_passes_through_each_source() -> None:
    mixture = PackedMixture(corpus(a=[10], b=[40]), {"a": 1, "b": 1}, 5, 0)
    assert mixture.epochs(0) == {"a": 0.0, "b": 0.0}
    assert mixture.epochs(16) == {"a": 4.0, "b": 1.0}


@given(WEIGHTS, st.integers(1, 1000))
def test_shares_are_the_weights_in_any_unit(weights: dict[str, int], factor: int) -> None:
    shares = mixture_shares(weights)
    assert mixture_shares({name: weight * factor for name, weight in weights.items()}) == shares
    assert mixture_shares({name: weight / 1000 for name, weight in weights.items()}) == shares
    assert math.gcd(*shares.values()) == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "not all 0"),
        ({"a": 0.0}, "not all 0"),
        ({"a": -1.0}, "at least 0"),
        ({"a": math.nan}, "finite"),
        ({"a": math.inf}, "finite"),
        ({"a": 0.1234567, "b": 1}, "too fine; write whole numbers"),
        ({"a": 1, "z": 1}, "no source 'z'; it has a, b"),
        ({"empty": 1}, "no source 'empty'"),
    ],
)
def test_weights_that_make_no_sense(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PackedMixture(corpus(a=[4], b=[4]), weights, 4, 0)


def test_a_source_without_training_documents_is_refused_unless_its_weight_is_zero() -> None:
    sources = corpus(a=[4], empty=[])
    with pytest.raises(UsageError, match="source 'empty' has no training documents"):
        PackedMixture(sources, {"a": 1, "empty": 1}, 4, 0)
    assert PackedMixture(sources, {"a": 1, "empty": 0}, 4, 0).names == ("a",)


# Held-out documents


def test_held_out_documents_are_whole_and_share_tokens_between_sources() -> None:
    sources = corpus(a=[3] * 100, b=[21] * 100, c=[5] * 2)
    given_documents = list(sources.held_out_documents(["a", "b", "c"], 400))
    targets = Counter[str]()
    for name, index, ids, num_bytes in given_documents:
        assert ids.tolist() == sources.sources[name].held_out.document(index).tolist()
        assert num_bytes == len(ids)
        targets[name] += len(ids) - 1
    assert targets["c"] == 8
    assert abs(targets["a"] - targets["b"]) <= 20
    # The last document is whole, so the limit is overrun by less than one document.
    assert 400 <= sum(targets.values()) < 420
    order_in_b = [index for name, index, _, _ in given_documents if name == "b"]
    assert order_in_b != sorted(order_in_b)
    assert len({(name, index) for name, index, _, _ in given_documents}) == len(given_documents)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_smaller_held_out_set_is_a_prefix_of_a_larger_one(one: int, two: int) -> None:
    sources = corpus(a=[3, 9, 4] * 5, b=[7, 2] * 5)
    small, large = (
        [(name, index) for name, index, _, _ in sources.held_out_documents(["a", "b"], limit)]
        for limit in sorted((one, two))
    )
    assert small == large[: len(small)]


def test_all_held_out_documents() -> None:
    sources = corpus(a=[3, 9, 4], b=[7])
    assert len(list(sources.held_out_documents(["a", "b"], None))) == 4
    assert list(sources.held_out_documents([], 10)) == []
    with pytest.raises(UsageError, match="no source 'z'"):
        list(sources.held_out_documents(["z"], 10))


def test_there_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no corpus there"):
        Corpus.open(tmp_path / "absent")
    (tmp_path / "manifest.json").write_text('{"stage": "rl"}')
    with pytest.raises(RunError, match="not a corpus manifest"):
        Corpus.open(tmp_path)
