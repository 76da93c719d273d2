"""Could the numbers mean what they seem to mean? Conditions without which a comparison says little."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlprior.statistics.comparisons import MIN_UNITS, effective_size
from rlprior.study.analysis import Analysis, TaskAnalysis
from rlprior.study.results import Study

MAX_UNIGRAM_RATIO = 0.5
MIN_HELD_OUT_TOKENS = 50_000
MIN_QUESTIONS = 200
ROOM_POINTS = (10.0, 80.0)
MAX_FAILED_SHARE = 0.1
MAX_DEAD_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition: what was found in the worst arm, what is expected, and what it means if not met."""

    name: str
    found: str
    expected: str
    verdict: Literal["met", "not met"]
    meaning: str


def check_study(study: Study, analysis: Analysis) -> list[Check]:
    """Every condition that can be checked with what is finished."""
    checks = [*_check_text(study, analysis)]
    for task in analysis.tasks:
        checks += _check_task(task)
    shares = dead_group_shares(study)
    if shares:
        checks.append(
            _check(
                "Groups without a signal in RL",
                max(shares.values()) <= MAX_DEAD_SHARE,
                f"up to {max(shares.values()):.0%} of sampled groups",
                f"at most {MAX_DEAD_SHARE:.0%}",
                "groups that are all right or all wrong teach nothing: the problems are too easy or too hard",
            )
        )
    return checks


def _check(name: str, met: bool, found: str, expected: str, meaning: str) -> Check:
    verdict: Literal["met", "not met"] = "met" if met else "not met"
    return Check(name=name, found=found, expected=expected, verdict=verdict, meaning=meaning)


def _check_text(study: Study, analysis: Analysis) -> Iterable[Check]:
    ratios = [
        row.perplexity.value / row.unigram_perplexity.value
        for row in analysis.likelihood
        if row.perplexity and row.unigram_perplexity
    ]
    if not ratios:
        return
    yield _check(
        "Perplexity against a unigram model",
        max(ratios) <= MAX_UNIGRAM_RATIO,
        f"{max(ratios):.0%} of the unigram model's",
        f"at most {MAX_UNIGRAM_RATIO:.0%}",
        "a model that knows only token frequencies would reach 100%: more training is needed",
    )
    finals = [
        checkpoint.likelihood
        for (arm, seed, stage) in study.runs
        if stage == analysis.base_stage
        and (checkpoint := study.final(arm, seed, stage)) is not None
        and checkpoint.likelihood is not None
    ]
    smallest = min(finals, key=lambda one: one.num_tokens.sum())
    yield _check(
        "Held-out text",
        smallest.num_tokens.sum() >= MIN_HELD_OUT_TOKENS,
        f"{smallest.num_tokens.sum():,.0f} tokens",
        f"at least {MIN_HELD_OUT_TOKENS:,} tokens",
        "small sets give wide intervals",
    )
    size = effective_size(smallest.num_tokens)
    yield _check(
        "Held-out documents",
        size >= MIN_UNITS,
        f"{len(smallest.document_ids)}, as good as {size:.0f} of one length",
        f"as good as {MIN_UNITS} or more",
        "a few long documents decide everything: intervals over documents may be too narrow",
    )


def _check_task(task: TaskAnalysis) -> Iterable[Check]:
    yield _check(
        f"Questions of {task.name}",
        task.num_questions >= MIN_QUESTIONS,
        f"{task.num_questions:,}",
        f"at least {MIN_QUESTIONS}",
        "small sets give wide intervals",
    )
    before = [row.before["avg"].value for row in task.rows if "avg" in row.before]
    if before:
        low, high = ROOM_POINTS
        yield _check(
            f"Room for RL on {task.name}",
            low <= min(before) and max(before) <= high,
            f"{task.score_label('avg')} from {min(before):.1f} to {max(before):.1f}",
            f"{low:g} to {high:g} points",
            "close to 0 or to 100 there is little for RL to start from, or to gain",
        )
    if before and task.baseline_accuracy is not None:
        constant = 100 * task.baseline_accuracy
        yield _check(
            f"Better than guessing on {task.name}",
            task.beats_guessing,
            f"{min(before):.1f} points",
            f"above {constant:.1f}, the most frequent answer",
            "the model may not read the questions",
        )
    for name, shares in (
        (f"Responses cut at the length limit, {task.name}", [row.truncated_share for row in task.rows]),
        (f"Responses without an answer, {task.name}", [row.unparsable_share for row in task.rows]),
    ):
        known = [share for pair in shares for share in pair if share is not None]
        if known:
            yield _check(
                name,
                max(known) <= MAX_FAILED_SHARE,
                f"up to {max(known):.1%}",
                f"at most {MAX_FAILED_SHARE:.0%}",
                "scores would measure format rather than reasoning",
            )


def dead_group_shares(study: Study) -> dict[str, float]:
    """Mean share, over RL steps and seeds, of an arm's sampled groups that were all right or all wrong."""
    shares = {arm.name: _logged(study, arm.name, "dead_group_share") for arm in study.arms}
    return {arm: sum(values) / len(values) for arm, values in shares.items() if values}


def _logged(study: Study, arm: str, name: str) -> Sequence[float]:
    records = (
        record for seed in study.seeds if (run := study.runs.get((arm, seed, "rl"))) for record in run.metrics
    )
    values = [record.get(name) for record in records]
    return [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
