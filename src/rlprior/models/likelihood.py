"""What a model says of text that it did not write: every predicted token once, in the fused pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlprior.config import UsageError
from rlprior.data.packing import IGNORE_INDEX, Corpus
from rlprior.models.causal_lm import (
    evaluation_mode,
    head_weight,
    last_hidden_states,
    logit_softcap,
    require_linear_head,
)
from rlprior.objectives import CrossEntropy, linear_shaped_cross_entropy

# R windows of a batch, T positions, D width, C positions of a chunk, V vocabulary

BATCH_TOKENS = 8192
"""Positions of one forward pass."""
KL_CHUNK_LOGITS = 1 << 24
"""Logits of one model held at a time for a divergence: 64 MiB in float32."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeldOutDocument:
    """Token ids of one document, with its special tokens, and what it is called.

    Attributes:
        id: names it.
        token_ids: [T] integers.
        num_bytes: of the text whose tokens are predicted, in UTF-8.
        num_given: tokens at the start that are read and not predicted: 1, or a whole prompt.
    """

    id: str
    token_ids: np.ndarray
    num_bytes: int
    num_given: int = 1

    @property
    def num_predicted(self) -> int:
        """How many tokens are predicted."""
        return max(len(self.token_ids) - self.num_given, 0)


@dataclass(frozen=True, kw_only=True)
class TokenMeasurements:
    """What a model says of each predicted token, all in its own distribution; the documents' tokens follow each other.

    Attributes:
        document_ids: of D documents.
        num_tokens: [D] int64, predicted tokens of each.
        num_bytes: [D] int64.
        top_k: size of the head.
        cross_entropy_nats: [N] float32, `-log p_x`.
        entropy_nats: [N] float32.
        head_mass: [N] float32, probability of the `top_k` most probable tokens, more where logits tie.
        target_rank: [N] float32, 1 + the number of tokens that are more probable than the target; exact below 2^24.
        top_prob: [N] float32, probability of the most probable token.
    """

    document_ids: tuple[str, ...]
    num_tokens: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]
    top_k: int
    cross_entropy_nats: FloatArray
    entropy_nats: FloatArray
    head_mass: FloatArray
    target_rank: FloatArray
    top_prob: FloatArray

    def by_document(self) -> dict[str, list[Any]]:
        """Sums over each document's tokens: columns with one entry a document, from which any mean can be formed and paired.

        Returns:
            document_ids, num_tokens, num_bytes, cross_entropy_nats, entropy_nats, head_mass, target_rank, top_prob, and num_top1, the
            tokens that no other is more probable than.
        """
        columns = {name: getattr(self, name) for name in _TOKEN_COLUMNS}
        columns["num_top1"] = self.target_rank == 1
        return {
            "document_ids": list(self.document_ids),
            "num_tokens": self.num_tokens.tolist(),
            "num_bytes": self.num_bytes.tolist(),
            **{name: sum_by_document(values, self.num_tokens).tolist() for name, values in columns.items()},
        }


_TOKEN_COLUMNS = ("cross_entropy_nats", "entropy_nats", "head_mass", "target_rank", "top_prob")


def sum_by_document(values: npt.NDArray[Any], num_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Sums [D], in float64, of values [N] of tokens whose documents follow each other.

    >>> sum_by_document(np.array([1.0, 2.0, 4.0]), np.array([2, 0, 1]))
    array([3., 0., 4.])
    """
    owners = np.repeat(np.arange(len(num_tokens)), num_tokens)
    return np.bincount(owners, weights=values, minlength=len(num_tokens)).astype(np.float64)


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


def measure_tokens(
    model: Any,
    documents: Sequence[HeldOutDocument],
    *,
    window_tokens: int,
    top_k: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> TokenMeasurements:
    """Cross-entropy, entropy, head mass, rank and confidence of every predicted token.

    Every token but those that a document gives is predicted exactly once, from the tokens before it in its window: a document longer
    than `window_tokens` is cut into windows that follow each other, as in training. Logits are held a chunk at a time. Measured on
    sequences that another model wrote, `-cross_entropy_nats` is the log-probability that this one gives them (ReMiT, Figures 2 and 3).

    Args:
        model: a Hugging Face causal model.
        documents: what it reads.
        window_tokens: longest context of a predicted token, at least 1.
        top_k: size of the head, at least 1.
        batch_tokens: positions of one forward pass; memory and rounding only.
        progress: called with the number of windows of each batch.

    Raises:
        UsageError: the model's logits are not its hidden states times its output embedding.
    """
    num_tokens = np.array([document.num_predicted for document in documents], dtype=np.int64)
    found = np.zeros((len(_TOKEN_COLUMNS), int(num_tokens.sum())), dtype=np.float32)

    def measure(hidden_RTD: Tensor, targets_RT: Tensor) -> Tensor:
        _, metrics = linear_shaped_cross_entropy(
            hidden_RTD,
            head_weight(model),
            targets_RT,
            CrossEntropy(),
            reduction="sum",
            return_metrics=True,
            metrics_top_k=top_k,
            logit_softcap=logit_softcap(model),
        )
        columns = (
            metrics.cross_entropy,
            metrics.entropy,
            metrics.head_mass,
            metrics.target_rank,
            metrics.top_prob,
        )
        return torch.stack(columns)[:, targets_RT != IGNORE_INDEX]

    with evaluation_mode(model):
        require_linear_head(model)
        for batch in _windows(documents, window_tokens, batch_tokens):
            inputs_RT, targets_RT = batch.tensors(head_weight(model).device)
            values = measure(last_hidden_states(model, inputs_RT), targets_RT)
            found[:, batch.places] = values.float().cpu().numpy()
            if progress:
                progress(len(batch.pieces))
    return TokenMeasurements(
        document_ids=tuple(document.id for document in documents),
        num_tokens=num_tokens,
        num_bytes=np.array([document.num_bytes for document in documents], dtype=np.int64),
        top_k=top_k,
        **dict(zip(_TOKEN_COLUMNS, found, strict=True)),
    )


def measure_kl(
    model: Any,
    reference: Any,
    documents: Sequence[HeldOutDocument],
    *,
    window_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """Divergence of the reference's prediction from the model's at every predicted token, exact over the vocabulary.

    KL(reference || model) = sum_v q_v (log q_v - log p_v)

    Args:
        model: p.
        reference: q, of the same vocabulary; the direction is the one that distillation from it minimises. Exchange the two for the other.
        documents, window_tokens, batch_tokens, progress: as in `measure_tokens`.

    Returns:
        [N] float32, in the order of `measure_tokens`; `sum_by_document` forms sums.

    Raises:
        UsageError: the vocabularies have different sizes, or a model's head is not linear.

    Source: ReMiT (RL-Guided Mid-Training for Iterative LLM Evolution), Figure 6b, which names no direction.
    """
    sizes = [len(head_weight(one)) for one in (model, reference)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"a divergence needs one vocabulary: the model has {sizes[0]} tokens and the reference {sizes[1]}"
        )
    found = np.zeros(sum(document.num_predicted for document in documents), dtype=np.float32)
    with evaluation_mode(model), evaluation_mode(reference):
        for one in (model, reference):
            require_linear_head(one)
        for batch in _windows(documents, window_tokens, batch_tokens):
            inputs_RT, targets_RT = batch.tensors(head_weight(model).device)
            is_predicted_RT = targets_RT != IGNORE_INDEX
            hidden = [last_hidden_states(one, inputs_RT)[is_predicted_RT] for one in (model, reference)]
            num_rows = max(1, KL_CHUNK_LOGITS // sizes[0])
            pieces = zip(*(one.split(num_rows) for one in hidden), strict=True)
            values = [
                _kl_nats(_log_probs(reference, theirs_CD), _log_probs(model, ours_CD))
                for ours_CD, theirs_CD in pieces
            ]
            found[batch.places] = torch.cat(values).cpu().numpy()
            if progress:
                progress(len(batch.pieces))
    return found


def _log_probs(model: Any, hidden_CD: Tensor) -> Tensor:
    logits_CV = (hidden_CD @ head_weight(model).T).float()
    if (cap := logit_softcap(model)) is not None:
        logits_CV = cap * torch.tanh(logits_CV / cap)
    return logits_CV.log_softmax(-1)


def _kl_nats(log_q_CV: Tensor, log_p_CV: Tensor) -> Tensor:
    """Sum over v of q (log q - log p); at equal distributions rounding could leave it below 0."""
    return (log_q_CV.exp() * (log_q_CV - log_p_CV)).sum(-1).clamp_min(0)


@dataclass(frozen=True)
class _Windows:
    """Windows of one forward pass.

    Attributes:
        pieces: token ids of each, one more than it has positions.
        num_given: how many of a piece's tokens, its first included, are not predicted.
        places: where the predicted tokens go, window by window.
    """

    pieces: list[np.ndarray]
    num_given: list[int]
    places: npt.NDArray[np.int64]

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets [R, T], padded on the right: causal attention never looks there, and its targets are ignored."""
        longest = max(len(piece) for piece in self.pieces) - 1
        inputs_RT = torch.zeros(len(self.pieces), longest, dtype=torch.long)
        targets_RT = torch.full((len(self.pieces), longest), IGNORE_INDEX)
        for row, (piece, given) in enumerate(zip(self.pieces, self.num_given, strict=True)):
            ids = torch.from_numpy(piece.astype(np.int64))
            inputs_RT[row, : len(ids) - 1] = ids[:-1]
            targets_RT[row, given - 1 : len(ids) - 1] = ids[given:]
        return inputs_RT.to(device), targets_RT.to(device)


def _windows(
    documents: Sequence[HeldOutDocument], window_tokens: int, batch_tokens: int
) -> Iterator[_Windows]:
    """Windows that predict something, those of like length together, at most `batch_tokens` positions a batch."""
    offsets = np.cumsum([0, *(document.num_predicted for document in documents)])
    windows = [
        (min(window_tokens, len(document.token_ids) - 1 - start), number, start)
        for number, document in enumerate(documents)
        for start in range(0, len(document.token_ids) - 1, window_tokens)
        if start + window_tokens + 1 > document.num_given
    ]

    def gather(batch: Sequence[tuple[int, int, int]]) -> _Windows:
        pieces, given, places = [], [], []
        for length, number, start in batch:
            document = documents[number]
            pieces.append(document.token_ids[start : start + length + 1])
            given.append(max(document.num_given - start, 1))
            first = offsets[number] + start + given[-1] - document.num_given
            places.append(np.arange(first, first + length + 1 - given[-1]))
        return _Windows(pieces, given, np.concatenate(places))

    batch: list[tuple[int, int, int]] = []
    for window in sorted(windows):
        if batch and (len(batch) + 1) * window[0] > batch_tokens:
            yield gather(batch)
            batch = []
        batch.append(window)
    if batch:
        yield gather(batch)


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
