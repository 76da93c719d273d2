"""Fixed-length rows from a prepared corpus, as a pure function of (seed, row number): the data cursor is a number of rows.

Shapes: B batch rows, T positions of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlprior.config import RunError, UsageError
from rlprior.seeding import numpy_generator

IGNORE_INDEX = -100
MAX_SCHEDULE_ROWS = 100_000


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents of one side of one source, concatenated and memory-mapped.

    Attributes:
        tokens: [num_tokens] uint16 or uint32; each document between its first token and <|eos|>.
        offsets: [num_documents + 1] int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        num_bytes: [num_documents] int64; UTF-8 bytes of the texts, special tokens not counted.
        ids: [num_documents] 16 hexadecimal digits of the texts' SHA-256, as bytes.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray
    ids: np.ndarray

    @classmethod
    def open(cls, directory: Path, side: str) -> TokenizedDocuments:
        """Memory-map the files of one side.

        Raises:
            RunError: a file is missing or does not fit the others.
        """
        try:
            arrays = {
                name: _open_array(directory / f"{side}.{name}.npy")
                for name in ("tokens", "offsets", "bytes", "ids")
            }
        except (OSError, EOFError, ValueError) as error:
            raise RunError(f"{directory}: the corpus is damaged ({error}); prepare it again") from None
        documents = cls(arrays["tokens"], arrays["offsets"], arrays["bytes"], arrays["ids"])
        lengths = {len(documents.offsets) - 1, len(documents.num_bytes), len(documents.ids)}
        if len(lengths) > 1 or documents.offsets[-1] != len(documents.tokens):
            raise RunError(
                f"{directory}: the corpus is damaged (its {side} files do not fit together); prepare it again"
            )
        return documents

    def __len__(self) -> int:
        return len(self.num_bytes)

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def _open_array(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.asarray(array)  # a plain view of the map: indexing a memmap costs several times more


@dataclass(frozen=True)
class TokenizedSource:
    """The two sides of one source."""

    name: str
    train: TokenizedDocuments
    held_out: TokenizedDocuments


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus on disk.

    Attributes:
        directory: where it is.
        sources: by name.
        manifest: what `prepare` wrote about it.
    """

    directory: Path
    sources: Mapping[str, TokenizedSource]
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Corpus:
        """Open a corpus, or the run directory of the data stage that holds one.

        Raises:
            UsageError: there is no corpus.
            RunError: the corpus is damaged.
        """
        root = directory / "corpus" if (directory / "corpus").is_dir() else directory
        path = root / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            sources = {
                name: TokenizedSource(
                    name,
                    TokenizedDocuments.open(root / "sources" / name, "train"),
                    TokenizedDocuments.open(root / "sources" / name, "held_out"),
                )
                for name in manifest["sources"]
            }
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"{directory}: no corpus there; prepare one first") from None
        except (ValueError, KeyError):
            raise RunError(f"{path}: not a corpus manifest; prepare the corpus again") from None
        return cls(root, sources, manifest)

    @property
    def tokenizer_directory(self) -> Path:
        """Hugging Face folder of the tokenizer."""
        return self.directory / "tokenizer"

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return self.manifest["vocab_size"]

    def source(self, name: str) -> TokenizedSource:
        """A source by name; UsageError with the names that exist."""
        if name not in self.sources:
            raise UsageError(f"the corpus has no source {name!r}; it has {', '.join(self.sources)}")
        return self.sources[name]

    def held_out_documents(
        self, sources: Sequence[str], max_tokens: int | None
    ) -> Iterator[tuple[str, int, np.ndarray, int]]:
        """Whole held-out documents, in a fixed order that gives the sources equal shares of tokens while they last.

        A smaller `max_tokens` gives a prefix of what a larger one gives.

        Args:
            sources: names.
            max_tokens: stop once so many targets (a document's tokens but its first) were given; None for all documents.

        Yields:
            Source, document number in it, token ids, UTF-8 bytes of the text.
        """
        sides = {name: self.source(name).held_out for name in sources}
        orders = {name: iter(np.argsort(side.ids, kind="stable").tolist()) for name, side in sides.items()}
        given = dict.fromkeys(sides, 0)
        while orders and (max_tokens is None or sum(given.values()) < max_tokens):
            name = min(orders, key=lambda name: given[name])
            index = next(orders[name], None)
            if index is None:
                del orders[name]
                continue
            ids = sides[name].document(index)
            given[name] += len(ids) - 1
            yield name, index, ids, int(sides[name].num_bytes[index])


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
        self.num_tokens = len(documents.tokens)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.diff(self._documents.offsets)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers in the order of an epoch, and where each of them ends in it."""
        if self._last_epoch is None or self._last_epoch[0] != epoch:
            order = numpy_generator(self._seed, "documents", self._name, epoch).permutation(
                len(self._documents)
            )
            self._last_epoch = (epoch, order, np.cumsum(self._lengths[order]))
        return self._last_epoch[1:]

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start` to `stop` of the stream, and for each a number that is its document's in its epoch alone."""
        tokens: list[np.ndarray] = []
        instances: list[np.ndarray] = []
        while start < stop:
            epoch, begin = divmod(start, self.num_tokens)
            end = min(self.num_tokens, begin + stop - start)
            order, ends = self._epoch_order(epoch)
            first, last = np.searchsorted(ends, [begin, end - 1], side="right")
            chosen = order[first : last + 1]
            document_starts = ends[first : last + 1] - self._lengths[chosen]
            clipped = np.minimum(ends[first : last + 1], end) - np.maximum(document_starts, begin)
            shift = np.repeat(self._documents.offsets[chosen] - document_starts, clipped)
            tokens.append(self._documents.tokens[np.arange(begin, end) + shift])
            number = np.arange(first, last + 1) + epoch * len(order)
            instances.append(np.repeat(number, clipped))
            start += end - begin
        return np.concatenate(tokens), np.concatenate(instances)
