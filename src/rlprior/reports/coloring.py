"""Colours of the tokens on the page of samples: what a model says of each, or how two models differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlprior.config import UsageError
from rlprior.data.tokenizer import encode_prompt
from rlprior.models.causal_lm import load_model, load_tokenizer
from rlprior.models.token_scores import Continuation, TokenScores, score_tokens, token_pieces
from rlprior.reports.samples import Card, Page, choose, encode_data
from rlprior.sampling.pools import GradedSample
from rlprior.world import ALONE

MAX_SCORED_QUESTIONS = 20
"""Questions of a store whose tokens are coloured."""
MAX_SCORED_RESPONSES = 6
"""Responses to such a question; the first of every other verdict is added."""
MAX_SCORED_TOKENS = 1024
"""Of a response: those after are not coloured."""
MAX_SCORE_BYTES = 4_500_000
"""Of all tokens with their numbers."""
NUMBER_BYTES = 9
"""Of a number on the page, at most: `-999.999,`."""

Progress = Callable[[str, int, int], None]


@dataclass
class _Target:
    """A sample whose tokens are scored, where they go, and they themselves."""

    card: Card
    one: GradedSample
    data: dict[str, Any]
    tokens: dict[str, Any] = field(default_factory=dict)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.one.sample.token_ids[:MAX_SCORED_TOKENS]


def color_tokens(
    page: Page, model: Path, against: Path | None = None, progress: Progress = lambda *_: None
) -> None:
    """Add to the first samples of a page what a model says of their tokens, and what another one does.

    Args:
        page: as collected.
        model, against: Hugging Face folders of one tokenizer, the samples'.
        progress: called with what is done, the number of samples done and their number.

    Raises:
        UsageError: a model that cannot be loaded, or is not of the samples' tokenizer or the other model's; or there are no prompts to
            compute its numbers from.
        RunError: a model's logits are not numbers.
    """
    targets = _targets(page.cards)
    if not targets:
        raise UsageError(
            "no token can be coloured: this run kept no questions (samples/*.questions.jsonl); evaluate again into another folder"
        )
    tokenizer = load_tokenizer(model)
    _require_own_tokens(model, tokenizer, targets)
    if against:
        _require_one_vocabulary(model, tokenizer, against, load_tokenizer(against))
    targets = _that_fit(targets, tokenizer, num_columns=3 if against else 2)
    for target, scores in zip(targets, _score(model, tokenizer, targets, progress), strict=True):
        target.tokens["log_prob"] = _rounded(scores.log_prob_nats)
        target.tokens["entropy"] = _rounded(scores.entropy_nats)
    if against:
        for target, scores in zip(targets, _score(against, tokenizer, targets, progress), strict=True):
            target.tokens["other"] = _rounded(scores.log_prob_nats)
    for target in targets:
        target.data["tokens"] = target.tokens
    page.model, page.against = _label(model), _label(against) if against else None
    page.notes.append(
        f"Tokens are coloured by {model}{f' and {against}' if against else ''} in {len(targets):,} responses: of the first "
        f"{MAX_SCORED_QUESTIONS} questions of each task and step the first {MAX_SCORED_RESPONSES} responses and the first of every other "
        f"verdict, up to {MAX_SCORED_TOKENS:,} tokens of each, as far as the page has room. Their numbers are at temperature 1 over the "
        "whole vocabulary; the log p beside a response is its sum under the decoding that it was drawn with."
    )


def _label(model: Path) -> str:
    """A checkpoint by its run and step, any other folder by its name.

    >>> _label(Path("runs/ce/checkpoints/step-00000400")), _label(Path("models/base"))
    ('ce/step-00000400', 'base')
    """
    return f"{model.parent.parent.name}/{model.name}" if model.parent.name == "checkpoints" else model.name


def _targets(cards: Iterable[Card]) -> list[_Target]:
    """What is scored: the first questions of all stores, then the second ones, and so on."""
    places: Counter[int] = Counter()
    found: list[tuple[int, _Target]] = []
    for card in cards:
        place = places[id(card.pool)]
        if card.problem_id not in card.pool.questions or place == MAX_SCORED_QUESTIONS:
            continue
        places[id(card.pool)] += 1
        chosen = {id(one) for one in choose(card.samples, MAX_SCORED_RESPONSES)}
        for one, data in zip(card.samples, card.data["samples"], strict=True):
            if id(one) in chosen and one.sample.token_ids:
                found.append((place, _Target(card, one, data)))
    found.sort(key=lambda one: one[0])
    return [target for _, target in found]


def _that_fit(targets: Sequence[_Target], tokenizer: Any, *, num_columns: int) -> list[_Target]:
    """The first targets, as many as the page has room for, with their tokens; known before anything is computed."""
    num_bytes = 0
    for place, target in enumerate(targets):
        ids = target.token_ids
        target.tokens = {"ids": ids, "pieces": token_pieces(tokenizer, ids)}
        num_bytes += len(encode_data(target.tokens)) + num_columns * NUMBER_BYTES * len(ids)
        if num_bytes > MAX_SCORE_BYTES:
            return list(targets[:place])
    return list(targets)


def _score(
    model_path: Path, tokenizer: Any, targets: Sequence[_Target], progress: Progress
) -> list[TokenScores]:
    model: Any = load_model(model_path)
    num_done = 0

    def report(num_more: int) -> None:
        nonlocal num_done
        num_done += num_more
        progress(f"tokens under {model_path.name}", num_done, len(targets))

    continuations = [
        Continuation(
            encode_prompt(tokenizer, target.card.pool.questions[target.card.problem_id].prompt),
            target.token_ids,
        )
        for target in targets
    ]
    return score_tokens(model.to(ALONE.device), continuations, name=str(model_path), progress=report)


def _require_one_vocabulary(model: Path, tokenizer: Any, against: Path, other: Any) -> None:
    own, others = tokenizer.get_vocab(), other.get_vocab()
    if own != others:
        different = len(own.items() ^ others.items())
        raise UsageError(
            f"{model} and {against}: differences of tokens need one tokenizer, and {different} entries of their vocabularies differ"
        )


def _require_own_tokens(model: Path, tokenizer: Any, targets: Sequence[_Target]) -> None:
    """The store does not say whose its tokens are, but its text does."""
    for target in targets:
        sample = target.one.sample
        # a stop string may have been cut off the text
        if not tokenizer.decode(sample.token_ids, skip_special_tokens=True).startswith(sample.text):
            raise UsageError(
                f"{model}: reads other text in the tokens of {target.card.pool.path}; give the model that was sampled, or one with its tokenizer"
            )


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]
