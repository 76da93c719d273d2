"""What a model says of each token of a response: its log-probability, and the entropy that it had to choose from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlprior.config import RunError, UsageError
from rlprior.data.packing import IGNORE_INDEX
from rlprior.models.causal_lm import evaluation_mode, head_weight
from rlprior.objectives import CrossEntropy, linear_shaped_cross_entropy

# R responses of a batch, T positions

BATCH_TOKENS = 4096
PROBE_TOKENS = 8


@dataclass(frozen=True)
class Continuation:
    """Token ids of a prompt, at least one, and of what follows it."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class TokenScores:
    """One entry a token of the response.

    Attributes:
        log_prob_nats: of the token, given all before it.
        entropy_nats: of the distribution that it was drawn from, over the whole vocabulary at temperature 1.
    """

    log_prob_nats: list[float]
    entropy_nats: list[float]


def score_tokens(
    model: Any,
    continuations: Sequence[Continuation],
    *,
    name: str,
    progress: Callable[[int], None] | None = None,
) -> list[TokenScores]:
    """Log-probability and entropy of every response token in the model's own distribution: temperature 1, no nucleus.

    Logits are formed a chunk of response positions at a time; those of prompts never are.

    Args:
        model: a Hugging Face causal model.
        continuations: what is scored; empty responses will do.
        name: of the model, for errors.
        progress: called with the number of continuations each batch adds.

    Returns:
        Scores in the order given.

    Raises:
        UsageError: a token or a position that the model does not have, or logits that are not its hidden states times its output embedding.
        RunError: the model's logits are not numbers.
    """
    _require_room(model, continuations, name)
    scores = [TokenScores([], [])] * len(continuations)
    # of like length together: little padding
    places = [i for i, one in enumerate(continuations) if one.response_ids]
    places.sort(key=lambda i: len(continuations[i]))
    with evaluation_mode(model):
        if places:
            _require_plain_head(model, continuations[places[0]], name)
        while places:
            size = 1
            while size < len(places) and (size + 1) * len(continuations[places[size]]) <= BATCH_TOKENS:
                size += 1
            batch, places = places[:size], places[size:]
            for place, one in zip(batch, _score_batch(model, [continuations[i] for i in batch]), strict=True):
                if not all(math.isfinite(value) for value in one.log_prob_nats + one.entropy_nats):
                    raise RunError(f"{name}: its logits are not numbers")
                scores[place] = one
            if progress:
                progress(size)
    return scores


def _score_batch(model: Any, batch: Sequence[Continuation]) -> list[TokenScores]:
    device = head_weight(model).device
    longest = max(map(len, batch)) - 1
    inputs_RT = torch.zeros(len(batch), longest, dtype=torch.long)
    targets_RT = torch.full((len(batch), longest), IGNORE_INDEX)
    spans: list[slice] = []
    for row, one in enumerate(batch):
        ids = torch.tensor([*one.prompt_ids, *one.response_ids])
        # padding on the right: causal attention never looks at it
        inputs_RT[row, : len(ids) - 1] = ids[:-1]
        spans.append(slice(len(one.prompt_ids) - 1, len(ids) - 1))
        targets_RT[row, spans[-1]] = torch.tensor(one.response_ids)
    _, metrics = linear_shaped_cross_entropy(
        _hidden_states(model, inputs_RT.to(device)),
        head_weight(model),
        targets_RT.to(device),
        CrossEntropy(),
        reduction="sum",
        metrics_top_k=1,
        logit_softcap=_softcap(model),
        return_metrics=True,
    )
    return [
        TokenScores((-metrics.cross_entropy[row, span]).tolist(), metrics.entropy[row, span].tolist())
        for row, span in enumerate(spans)
    ]


def _hidden_states(model: Any, input_ids_RT: torch.Tensor) -> torch.Tensor:
    return model.base_model(input_ids=input_ids_RT, use_cache=False).last_hidden_state


def _softcap(model: Any) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def _require_room(model: Any, continuations: Sequence[Continuation], name: str) -> None:
    vocab_size = len(head_weight(model))
    highest = max(
        (max(ids) for one in continuations for ids in (one.prompt_ids, one.response_ids) if ids), default=0
    )
    if highest >= vocab_size:
        raise UsageError(
            f"{name}: has no token {highest}; give the model that was sampled, or one with its tokenizer"
        )
    config = model.config.get_text_config()
    longest = max(map(len, continuations), default=0) - 1  # the last token is predicted, never read
    max_positions = getattr(config, "max_position_embeddings", longest)
    # rotary positions go on beyond those of training, as they do when a model is sampled; learned ones end
    if longest > max_positions and not getattr(config, "rope_parameters", None):
        raise UsageError(
            f"{name}: has {max_positions} learned positions, and a prompt with its response takes {longest}"
        )


def _require_plain_head(model: Any, one: Continuation, name: str) -> None:
    """Whether the chunked pass computes this model's logits is seen on the first tokens."""
    ids = torch.tensor(
        [[*one.prompt_ids, *one.response_ids][:PROBE_TOKENS]], device=head_weight(model).device
    )
    logits = _hidden_states(model, ids) @ head_weight(model).T
    cap = _softcap(model)
    expected = logits if cap is None else cap * torch.tanh(logits / cap)
    found = model(input_ids=ids, use_cache=False).logits
    # two float32 products of the same numbers, whose sums may be taken in another order
    if found.isfinite().all() and not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"{name}: its logits are more than its hidden states times its output embedding; it cannot be scored"
        )


def token_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the decoded whole, special tokens included.

    A token that ends inside a character adds nothing of it: the character belongs to the token that completes it.
    """
    pieces: list[str] = []
    # decoded are the tokens from `start`: those of the last whole characters, because what a token adds may depend on the one before
    start = boundary = shown = 0
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[start:end], skip_special_tokens=False)
        # an unfinished character decodes to one replacement, or to one a byte
        settled = text if end == len(token_ids) else text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(settled[shown:])
        shown = len(settled)
        if settled == text:
            start, boundary = boundary, end
            shown = len(tokenizer.decode(token_ids[start:end], skip_special_tokens=False))
    return pieces
