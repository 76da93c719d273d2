"""Multiple choice by log-likelihood: which continuation of its prompt a model finds most probable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from rlprior.config import RunError, UsageError
from rlprior.data.tokenizer import encode_prompt
from rlprior.models.causal_lm import (
    evaluation_mode,
    head_weight,
    last_hidden_states,
    logit_softcap,
    require_linear_head,
)
from rlprior.models.likelihood import BATCH_TOKENS
from rlprior.objectives import CrossEntropy, linear_shaped_cross_entropy
from rlprior.tasks.problem import LETTERS, Problem

# R rows of a batch, T positions, D width, P scored tokens

Score = Literal["raw", "normalized", "unconditional"]
PROBLEMS_AT_ONCE = 256
"""Problems whose texts are tokenized together: rows of like length are batched among them."""


def score_choices(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    headline: Score = "raw",
    batch_tokens: int = BATCH_TOKENS,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Answer each problem with the choice of the largest score.

    raw: log p(choice | prompt), summed over the choice's tokens
    normalized: raw / characters of the choice without its leading space
    unconditional: log p(choice | prompt) - log p(choice | nothing)

    Args:
        model: a Hugging Face causal model.
        tokenizer: its own.
        problems: `choices` are the continuations of `prompt` as they are scored, leading space included, and `answer` a letter. Where
            contexts differ and the continuation is one (WinoGrande), `reference` is {"contexts": [a text a choice], "continuation": text}.
        headline: the score that `num_correct` counts; unconditional scores are computed for it alone.
        batch_tokens: positions of one forward pass.
        max_tokens: longest row; None is the model's longest. A longer one loses the beginning of its prompt.
        progress: called with the number of problems of each step.

    Returns:
        Columns with one entry a problem: problem_ids, groups, num_correct (0 or 1, by the headline), num_correct_raw,
        num_correct_normalized, num_correct_unconditional (where asked for), log_probs (raw, one a choice), num_cut (choices whose
        prompt was cut); and num_samples = 1. Of equal scores the first choice wins.

    Raises:
        UsageError: a problem without two choices or whose answer is no letter of theirs.
        RunError: a choice alone is longer than a row.

    Source: lm-evaluation-harness 0.4.13: raw is its acc, normalized its acc_norm, unconditional its acc_mutual_info.
    Differs: every row begins with the tokenizer's first token, as documents do in training (the harness: `add_bos_token`), and a prompt
        that is cut keeps it. A choice that merges into its prompt's last token is tokenized alone; the harness gives it probability 1.
    """
    longest: int = max_tokens or model.config.get_text_config().max_position_embeddings
    names = ["raw", "normalized", *(["unconditional"] if headline == "unconditional" else [])]
    columns: dict[str, Any] = {
        "problem_ids": [problem.id for problem in problems],
        "groups": [problem.group for problem in problems],
        "num_samples": 1,
        **{f"num_correct_{name}": [] for name in names},
        "log_probs": [],
        "num_cut": [],
    }
    with evaluation_mode(model):
        require_linear_head(model)
        for start in range(0, len(problems), PROBLEMS_AT_ONCE):
            some = problems[start : start + PROBLEMS_AT_ONCE]
            pairs = [_pairs(problem) for problem in some]
            items = [
                _encode(tokenizer, *pair, longest, problem.id)
                for problem, of_problem in zip(some, pairs, strict=True)
                for pair in of_problem
            ]
            log_probs = _log_probs(model, items, batch_tokens)
            scores = {"raw": log_probs, "normalized": log_probs / [item.num_characters for item in items]}
            if "unconditional" in names:
                alone = [_encode(tokenizer, "", item.text, longest, "") for item in items]
                scores["unconditional"] = log_probs - _log_probs(model, alone, batch_tokens)
            ends = np.cumsum([len(of_problem) for of_problem in pairs])[:-1]
            for name, values in scores.items():
                columns[f"num_correct_{name}"] += _num_correct(some, np.split(values, ends))
            columns["log_probs"] += [of_problem.tolist() for of_problem in np.split(log_probs, ends)]
            is_cut = np.array([item.is_cut for item in items])
            columns["num_cut"] += [int(of_problem.sum()) for of_problem in np.split(is_cut, ends)]
            if progress:
                progress(len(some))
    return {**columns, "num_correct": columns[f"num_correct_{headline}"]}


def _num_correct(problems: Sequence[Problem], scores: Sequence[np.ndarray]) -> list[int]:
    """1 for each problem whose choice of the largest score is its answer."""
    best = [LETTERS[int(np.argmax(of_problem))] for of_problem in scores]
    return [int(letter == problem.answer) for letter, problem in zip(best, problems, strict=True)]


@dataclass(frozen=True)
class _Item:
    """One continuation with what comes before it.

    Attributes:
        token_ids: of both.
        num_given: tokens that come before, at least 1.
        text: the continuation.
        is_cut: the beginning of what comes before was left out.
    """

    token_ids: tuple[int, ...]
    num_given: int
    text: str
    is_cut: bool

    @property
    def num_characters(self) -> int:
        return max(1, len(self.text.lstrip()))


def _pairs(problem: Problem) -> list[tuple[str, str]]:
    """Context and continuation of each choice."""
    reference = problem.reference
    if isinstance(reference, dict) and "contexts" in reference:
        pairs = [(context, reference["continuation"]) for context in reference["contexts"]]
    else:
        pairs = [(problem.prompt, choice) for choice in problem.choices]
    if len(pairs) < 2 or problem.answer not in tuple(LETTERS[: len(pairs)]):
        raise UsageError(
            f"problem {problem.id}: {len(pairs)} choices and the answer {problem.answer!r}; it needs two or more, and the letter of one"
        )
    return pairs


def encode_continuation(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context, its first token included, and of what follows it, split where the context's own tokens end.

    White space that ends the context is moved to the continuation, whose first token it is part of.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    given = encode_prompt(tokenizer, context)
    following = encode_prompt(tokenizer, context + continuation)[len(given) :]
    return given, following or encode_prompt(tokenizer, continuation)[1:]


def _encode(tokenizer: Any, context: str, continuation: str, max_tokens: int, problem_id: str) -> _Item:
    given, following = encode_continuation(tokenizer, context, continuation)
    room = max_tokens + 1 - len(following)  # the last token is predicted and never read
    if room < 1:
        raise RunError(
            f"problem {problem_id}: the choice {continuation[:40]!r} has {len(following)} tokens, and the model reads {max_tokens}"
        )
    is_cut = len(given) > room
    if is_cut:
        given = [given[0], *given[len(given) - room + 1 :]]
    return _Item((*given, *following), len(given), continuation, is_cut)


def _log_probs(model: Any, items: Sequence[_Item], batch_tokens: int) -> np.ndarray:
    """Log-probability [I] of each continuation, in nats."""
    by_input: dict[tuple[int, ...], list[int]] = {}
    for number, item in enumerate(items):
        # the letters of a question are continuations of one row: it is read once
        by_input.setdefault(item.token_ids[:-1], []).append(number)
    totals = np.zeros(len(items))
    device = head_weight(model).device
    for rows in _batches(sorted(by_input, key=len), batch_tokens):
        inputs_RT = torch.zeros(len(rows), len(rows[-1]), dtype=torch.long)
        places: list[tuple[int, int, int, int]] = []  # item, row, position, target
        for row, input_ids in enumerate(rows):
            inputs_RT[row, : len(input_ids)] = torch.tensor(input_ids)
            for number in by_input[input_ids]:
                item = items[number]
                positions = range(item.num_given - 1, len(input_ids))
                places += [(number, row, place, item.token_ids[place + 1]) for place in positions]
        numbers_P, row_P, position_P, target_P = torch.tensor(places).T
        hidden_RTD = last_hidden_states(model, inputs_RT.to(device))
        nats_P = linear_shaped_cross_entropy(
            hidden_RTD[row_P.to(device), position_P.to(device)],
            head_weight(model),
            target_P.to(device),
            CrossEntropy(),
            reduction="none",
            logit_softcap=logit_softcap(model),
        )
        np.subtract.at(totals, numbers_P.numpy(), nats_P.double().cpu().numpy())
    return totals


def _batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """Rows of rising length, at most `batch_tokens` positions a batch where a row alone does not have more."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or (stop + 1 - start) * len(rows[stop]) > batch_tokens:
            yield rows[start:stop]
            start = stop
