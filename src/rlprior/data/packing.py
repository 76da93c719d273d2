"""Fixed-length rows from a prepared corpus, as a pure function of (seed, row number): the data cursor is a number of rows.

Shapes: B batch rows, T positions of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from rlprior.config import UsageError
from rlprior.data.corpus import Corpus, TokenizedDocuments
from rlprior.seeding import numpy_generator

IGNORE_INDEX = -100
MAX_SCHEDULE_ROWS = 100_000

BLOCK_DOCUMENTS = 16
READ_DOCUMENTS = 1 << 20
"""A multiple of `BLOCK_DOCUMENTS`."""


@dataclass(frozen=True)
class PackedBatch:
    """Rows of consecutive tokens; every tensor is int64, on the CPU unless moved.

    Attributes:
        input_ids: [B, T].
        targets: [B, T] next token, -100 where it belongs to another document.
        position_ids: [B, T] from 0 at each document or fragment of one.
        document_ids: [B, T] number of the document within its row; attention stays within equal numbers.
        source_ids: [B] index into `PackedMixture.names`.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    document_ids: Tensor
    source_ids: Tensor

    def rows(self, rows: slice) -> PackedBatch:
        """Some of the rows."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        return PackedBatch(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


def attention_mask(document_ids: Tensor) -> Tensor:
    """Where attention may look: back, and within the document.

    Args:
        document_ids: [B, T].

    Returns:
        [B, 1, T, T] bool; True where the query (third axis) sees the key (fourth).

    >>> attention_mask(torch.tensor([[0, 0, 1]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    same_BTT = document_ids[:, :, None] == document_ids[:, None, :]
    return same_BTT.tril().unsqueeze(1)


def mixture_shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Whole-number shares in the proportion of decimal weights; sources of weight 0 are left out.

    Raises:
        UsageError: a negative or infinite weight, none above 0, or weights so fine that a period exceeds 100,000 rows.

    >>> mixture_shares({"text": 0.9, "problems": 0.1})
    {'text': 9, 'problems': 1}
    """
    if any(not (math.isfinite(weight) and weight >= 0) for weight in weights.values()) or not any(
        weights.values()
    ):
        raise UsageError(f"mixture weights must be finite, at least 0 and not all 0, not {dict(weights)}")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight}
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    counts = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = math.gcd(*counts.values())
    shares = {name: count // divisor for name, count in counts.items()}
    if sum(shares.values()) > MAX_SCHEDULE_ROWS:
        raise UsageError(
            f"mixture weights {dict(weights)} are too fine; write whole numbers such as 1 and 2, or fewer decimals"
        )
    return shares


def row_schedule(shares: Sequence[int]) -> np.ndarray:
    """Source of each row of one period, as even as can be: no prefix is a whole row away from its proportion.

    With shares m_k of M = sum(m), the count x_k(n) of source k in the first n rows satisfies
    |x_k(n) - n m_k / M| <= 1 - 1 / (2K - 2) for K >= 2 sources.

    Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).

    Args:
        shares: [K] at least 1.

    Returns:
        [M] int64 in [0, K).

    >>> row_schedule([3, 1]).tolist()
    [0, 0, 1, 0]
    """
    num_sources, period = len(shares), sum(shares)
    if num_sources == 1:
        return np.zeros(period, dtype=np.int64)
    slack = 2 * num_sources - 2
    counts = [0] * num_sources
    schedule = np.empty(period, dtype=np.int64)
    for row in range(period):
        best, best_wait = -1, 0
        for k, share in enumerate(shares):
            # What source k is owed by the end of this row, in units of 1 / (M slack) rows.
            owed = slack * (share * (row + 1) - period * counts[k])
            wait = (slack - 1) * period - owed
            if owed >= period and (best < 0 or wait * shares[best] < best_wait * share):
                best, best_wait = k, wait
        schedule[row] = best
        counts[best] += 1
    return schedule


class PackedMixture:
    """An endless sequence of rows drawn from several sources in fixed proportions.

    Row r belongs to a source by a schedule that depends on the weights alone. A source's rows cut its token stream, its
    documents shuffled anew each epoch, into pieces of T tokens: each token is an input once an epoch, and documents are cut at
    row borders. Nothing is remembered between calls: `batch` is a function of the seed and the row numbers.
    """

    def __init__(self, corpus: Corpus, weights: Mapping[str, float], sequence_length: int, seed: int) -> None:
        """Take rows of `sequence_length` positions from `corpus`.

        Args:
            weights: source -> share of the rows, in any unit, read as decimals.

        Raises:
            UsageError: an unknown source, one without training documents, or weights that make no sense.
        """
        shares = mixture_shares(weights)
        for name in shares:
            if len(corpus.source(name).train) == 0:
                raise UsageError(
                    f"source {name!r} has no training documents; leave it out of the mixture or change its `held_out`"
                )
        self.names = tuple(shares)
        self.sequence_length = sequence_length
        self._streams = [_TokenStream(corpus.source(name).train, name, seed) for name in self.names]
        self._schedule = row_schedule(list(shares.values()))
        one_hot = np.arange(len(shares)) == self._schedule[:, None]
        self._counts = np.concatenate(
            [np.zeros((1, len(shares)), dtype=np.int64), np.cumsum(one_hot, axis=0)]
        )

    def rows_before(self, row: int) -> np.ndarray:
        """Number of rows of each source among the first `row` rows, in the order of `names`."""
        periods, rest = divmod(row, len(self._schedule))
        return periods * self._counts[-1] + self._counts[rest]

    def epochs(self, first_row: int) -> dict[str, float]:
        """How often the first `first_row` rows went through each source."""
        num_rows = self.rows_before(first_row)
        return {
            name: float(rows) * self.sequence_length / stream.num_tokens
            for name, rows, stream in zip(self.names, num_rows, self._streams, strict=True)
        }

    def batch(self, first_row: int, num_rows: int) -> PackedBatch:
        """Rows `first_row` to `first_row + num_rows`, whatever was asked before."""
        source_B = self._schedule[np.arange(first_row, first_row + num_rows) % len(self._schedule)]
        starts = self.rows_before(first_row)
        length = self.sequence_length
        tokens = np.empty((num_rows, length + 1), dtype=np.int64)
        instances = np.empty((num_rows, length + 1), dtype=np.int64)
        for k, stream in enumerate(self._streams):
            rows = np.flatnonzero(source_B == k)
            if len(rows):
                start = int(starts[k]) * length
                span_tokens, span_instances = stream.span(start, start + len(rows) * length + 1)
                windows = np.arange(len(rows))[:, None] * length + np.arange(length + 1)
                tokens[rows], instances[rows] = span_tokens[windows], span_instances[windows]
        return _pack(tokens, instances, source_B)


def _pack(tokens: np.ndarray, instances: np.ndarray, source_B: np.ndarray) -> PackedBatch:
    """Rows of T + 1 tokens, and the document instance of each, as model inputs."""
    continues = instances[:, 1:] == instances[:, :-1]
    starts_BT = np.ones_like(continues)
    starts_BT[:, 1:] = ~continues[:, :-1]
    positions = np.arange(starts_BT.shape[1])
    fragment_start_BT = np.maximum.accumulate(np.where(starts_BT, positions, 0), axis=1)
    return PackedBatch(
        input_ids=torch.from_numpy(tokens[:, :-1].copy()),
        targets=torch.from_numpy(np.where(continues, tokens[:, 1:], IGNORE_INDEX)),
        position_ids=torch.from_numpy(positions - fragment_start_BT),
        document_ids=torch.from_numpy(np.cumsum(starts_BT, axis=1) - 1),
        source_ids=torch.from_numpy(source_B.copy()),
    )


class _TokenStream:
    """The documents of one source, endlessly: every epoch all of them once, in an order of its own."""

    def __init__(self, documents: TokenizedDocuments, name: str, seed: int) -> None:
        self._documents, self._name, self._seed = documents, name, seed
        self._last_epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self.num_tokens = documents.num_tokens

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers in the order of an epoch, and where each block of `BLOCK_DOCUMENTS` of them ends in it.

        The one thing that grows with the corpus and is held in memory: 4.5 bytes a document.
        """
        if self._last_epoch is None or self._last_epoch[0] != epoch:
            num_documents = len(self._documents)
            order = np.arange(num_documents, dtype=np.uint32 if num_documents < 1 << 32 else np.int64)
            numpy_generator(self._seed, "documents", self._name, epoch).shuffle(order)
            block_tokens: list[np.ndarray] = []
            for start in range(0, num_documents, READ_DOCUMENTS):
                _, lengths = self._places(order[start : start + READ_DOCUMENTS])
                block_tokens.append(np.add.reduceat(lengths, np.arange(0, len(lengths), BLOCK_DOCUMENTS)))
            self._last_epoch = (epoch, order, np.cumsum(np.concatenate(block_tokens)))
        return self._last_epoch[1:]

    def _places(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin, and their lengths."""
        starts = self._documents.offsets[chosen]
        return starts, self._documents.offsets[chosen + 1] - starts

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start` to `stop` of the stream, and for each a number that is its document's in its epoch alone."""
        tokens: list[np.ndarray] = []
        instances: list[np.ndarray] = []
        while start < stop:
            epoch, begin = divmod(start, self.num_tokens)
            end = min(self.num_tokens, begin + stop - start)
            order, block_ends = self._epoch_order(epoch)
            first, last = np.searchsorted(block_ends, [begin, end - 1], side="right")
            numbers = np.arange(first * BLOCK_DOCUMENTS, min((last + 1) * BLOCK_DOCUMENTS, len(order)))
            places, lengths = self._places(order[numbers])
            ends = np.cumsum(lengths) + (block_ends[first - 1] if first else 0)
            # of each document, what lies between begin and end
            skipped = np.maximum(begin - (ends - lengths), 0)
            taken = np.minimum(ends, end) - (ends - lengths) - skipped
            some = taken > 0
            tokens.append(self._documents.gather((places + skipped)[some], taken[some]))
            instances.append(np.repeat(numbers[some] + epoch * len(order), taken[some]))
            start += end - begin
        return np.concatenate(tokens), np.concatenate(instances)
