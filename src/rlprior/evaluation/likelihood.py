"""Held-out likelihood: sums a document, so that any mean can be formed and paired by document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlprior.config import UsageError
from rlprior.data.packing import IGNORE_INDEX, Corpus
from rlprior.models.causal_lm import evaluation_mode, head_weight
from rlprior.objectives import CrossEntropy, linear_shaped_cross_entropy

# R windows of a batch, T positions


@dataclass(frozen=True)
class HeldOutDocument:
    """Token ids of one document, with its special tokens, and what it is called."""

    id: str
    token_ids: np.ndarray
    num_bytes: int


def held_out_documents(corpus: Corpus, sources: Sequence[str], max_tokens: int) -> list[HeldOutDocument]:
    """Whole held-out documents, the sources in equal shares, until `max_tokens` targets are reached or there are no more.

    Raises:
        UsageError: the sources have no held-out text.
    """
    documents: list[HeldOutDocument] = []
    num_tokens = 0
    for source, index, token_ids, num_bytes in corpus.held_out_documents(sources, max_tokens):
        documents.append(HeldOutDocument(f"{source}/{index}", token_ids, num_bytes))
        num_tokens += len(token_ids) - 1
    if num_tokens == 0:
        raise UsageError(f"evaluation.held_out_sources: no held-out text in {', '.join(sources)}")
    return documents


def measure_likelihood(
    model: Any,
    documents: Sequence[HeldOutDocument],
    *,
    window_tokens: int,
    top_k: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[Any]]:
    """Sums over each document's tokens of cross-entropy, entropy, head mass and rank, all in the model's own distribution.

    Every token but a document's first is predicted exactly once, from the tokens before it in its window: a document longer than
    `window_tokens` is cut into windows that follow each other, as in training.

    Returns:
        Columns with one entry a document: document_ids, num_tokens, num_bytes, cross_entropy_nats, entropy_nats, head_mass,
        target_rank.
    """
    names = ("cross_entropy_nats", "entropy_nats", "head_mass", "target_rank")
    sums = np.zeros((len(documents), len(names)))
    windows = [
        (number, start)
        for number, document in enumerate(documents)
        for start in range(0, len(document.token_ids) - 1, window_tokens)
    ]
    with evaluation_mode(model):
        for batch in _batches(documents, windows, window_tokens, batch_tokens):
            owners, values = _measure_windows(model, documents, batch, window_tokens, top_k)
            np.add.at(sums, owners, values)
            if progress:
                progress(len(batch))
    columns: dict[str, list[Any]] = {
        "document_ids": [document.id for document in documents],
        "num_tokens": [len(document.token_ids) - 1 for document in documents],
        "num_bytes": [document.num_bytes for document in documents],
    }
    return columns | {name: sums[:, i].tolist() for i, name in enumerate(names)}


def _batches(
    documents: Sequence[HeldOutDocument],
    windows: list[tuple[int, int]],
    window_tokens: int,
    batch_tokens: int,
) -> Iterator[list[tuple[int, int]]]:
    """Windows of like length together, at most `batch_tokens` positions a batch."""

    def length(window: tuple[int, int]) -> int:
        return min(window_tokens, len(documents[window[0]].token_ids) - 1 - window[1])

    ordered = sorted(windows, key=lambda window: (length(window), window))
    batch: list[tuple[int, int]] = []
    for window in ordered:
        if batch and (len(batch) + 1) * length(window) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _measure_windows(
    model: Any,
    documents: Sequence[HeldOutDocument],
    batch: list[tuple[int, int]],
    window_tokens: int,
    top_k: int,
) -> tuple[np.ndarray, np.ndarray]:
    pieces = [documents[number].token_ids[start : start + window_tokens + 1] for number, start in batch]
    longest = max(len(piece) for piece in pieces) - 1
    inputs_RT = torch.zeros(len(batch), longest, dtype=torch.long)
    targets_RT = torch.full((len(batch), longest), IGNORE_INDEX)
    for row, piece in enumerate(pieces):
        ids = torch.from_numpy(piece.astype(np.int64))
        # padding on the right: causal attention never looks at it, and its targets are ignored
        inputs_RT[row, : len(ids) - 1], targets_RT[row, : len(ids) - 1] = ids[:-1], ids[1:]
    device = head_weight(model).device
    hidden_RTD = model.model(input_ids=inputs_RT.to(device), use_cache=False).last_hidden_state
    _, metrics = linear_shaped_cross_entropy(
        hidden_RTD,
        head_weight(model),
        targets_RT.to(device),
        CrossEntropy(),
        reduction="sum",
        return_metrics=True,
        metrics_top_k=top_k,
    )
    columns: list[Tensor] = [metrics.cross_entropy, metrics.entropy, metrics.head_mass, metrics.target_rank]
    values = torch.stack([torch.nansum(column.double(), 1) for column in columns], 1).cpu().numpy()
    return np.array([number for number, _ in batch]), values


def unigram_cross_entropy(
    corpus: Corpus, sources: Sequence[str], documents: Sequence[HeldOutDocument]
) -> list[float]:
    """Summed cross-entropy, a document, of the unigram model of the sources' training text with one count added to every token.

    The floor that a language model has to beat: it knows how frequent tokens are, and no context. Where the sources have no
    training text (evaluation only), it is counted on the whole corpus's. A document's first token is never predicted and not
    counted. Of a source with several shards, the first one is counted.
    """
    trained = [name for name in sources if len(corpus.sources[name].train)] or list(corpus.sources)
    counts = np.ones(corpus.vocab_size)
    for name in trained:
        counts += corpus.sources[name].train.target_counts(corpus.vocab_size)
    nll_nats = -np.log(counts / counts.sum())
    return [float(nll_nats[document.token_ids[1:]].sum()) for document in documents]
