"""Which models would learn under GRPO, and why: verdicts in words from what `rlprior.evaluation.readiness` measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlprior.config import RunError, UsageError
from rlprior.evaluation.readiness import RESULT_FILE
from rlprior.evaluation.token_statistics import forking_threshold, share_above
from rlprior.rl.config import RLConfig
from rlprior.statistics.estimators import avg_at_m, pass_at_k, signal_at_g
from rlprior.statistics.intervals import Interval, difference_interval, score_interval
from rlprior.tasks.problem import Status

GROUP_SIZES = (4, 8, 16, 32, 64)
MIN_SIGNAL = 1 / (1 + RLConfig.max_refills)
"""Groups with a gradient that RL needs: below it more are drawn for each than the rounds that refilling allows by default (5)."""
MIN_FORM_SHARE = 0.9
"""Below this share of responses that end, or that state an answer, RL teaches the form before anything else: worth a sentence."""

Judgement = Literal["would learn", "borderline", "would hardly learn"]
FAULTS = {
    Status.WRONG: "state a wrong answer",
    Status.UNPARSABLE: "end without an answer that can be read",
    Status.TRUNCATED: "are cut by the length limit before they state one",
}


@dataclass(frozen=True, kw_only=True)
class TaskReadiness:
    """One model on one task; shares in [0, 1].

    Attributes:
        num_questions, num_samples: m samples of each question.
        group_size: G, the samples of a GRPO group.
        average: Avg@m.
        passed: Pass@k by k.
        signal: share of groups of a size that hold both a right and a wrong answer, by size.
        never, sometimes, always: share of questions with 0, some and m right answers.
        faults: share of all responses by status, of those that are not correct.
        ended: share of responses that end by themselves.
        readable: share of responses that state an answer.
        judgement, reasons, advice: the verdict in words.
    """

    task: str
    num_questions: int
    num_samples: int
    group_size: int
    average: Interval
    passed: Mapping[int, Interval]
    signal: Mapping[int, Interval]
    never: Interval
    sometimes: Interval
    always: Interval
    faults: Mapping[str, float]
    ended: float
    readable: float
    judgement: Judgement
    reasons: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def signal_at_group_size(self) -> Interval:
        """signal@G at the group size asked about."""
        return self.signal[self.group_size]


@dataclass(frozen=True, kw_only=True)
class ModelReadiness:
    """One model: what it was measured at, and a verdict a task."""

    label: str
    result: Mapping[str, Any]
    tasks: Mapping[str, TaskReadiness]


def check_group_size(group_size: int, num_samples: int) -> None:
    """UsageError where a group is larger than the pool of samples."""
    if not 2 <= group_size <= num_samples:
        raise UsageError(
            f"--group-size {group_size} must be between 2 and the {num_samples} samples of a question; draw more with --samples"
        )


def read_result(directory: Path) -> dict[str, Any]:
    """What the readiness stage wrote in `directory`."""
    try:
        return json.loads((directory / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(
            f"{directory}: no {RESULT_FILE} that can be read; run the same command again"
        ) from None


def judge_model(label: str, result: Mapping[str, Any], *, group_size: int) -> ModelReadiness:
    """The verdicts of one model.

    Raises:
        UsageError: there are fewer samples of a question than a group has.
    """
    tasks = {name: judge_task(name, task, group_size=group_size) for name, task in result["tasks"].items()}
    able = [name for name, one in tasks.items() if one.judgement == "would learn"]
    if able:
        hint = f"it would learn on {', '.join(able)}"
        tasks = {
            name: one if name in able else replace(one, advice=(hint, *one.advice))
            for name, one in tasks.items()
        }
    return ModelReadiness(label=label, result=result, tasks=tasks)


def judge_task(name: str, task: Mapping[str, Any], *, group_size: int) -> TaskReadiness:
    """Estimates, verdict and advice from a task's columns, whose samples have to be drawn as RL would draw them."""
    m, correct = int(task["num_samples"]), np.array(task["num_correct"], dtype=np.int64)
    check_group_size(group_size, m)
    sizes = sorted({group_size, *(size for size in GROUP_SIZES if size <= m)})
    num_responses = m * len(correct)
    faults = {status: task["statuses"].get(status, 0) / num_responses for status in FAULTS}
    lost = sum(task["statuses"].get(status, 0) for status in (Status.UNPARSABLE, Status.TRUNCATED))
    signal = {size: score_interval(signal_at_g(m, correct, size)) for size in sizes}
    average, never = score_interval(avg_at_m(m, correct)), score_interval(correct == 0)
    measured: dict[str, Any] = {
        "task": name,
        "num_questions": len(correct),
        "num_samples": m,
        "group_size": group_size,
        "average": average,
        "passed": {k: score_interval(pass_at_k(m, correct, k)) for k in _powers_of_two(m)},
        "signal": signal,
        "never": never,
        "sometimes": score_interval((correct > 0) & (correct < m)),
        "always": score_interval(correct == m),
        "faults": {str(status): share for status, share in faults.items()},
        "ended": 1 - sum(task["num_truncated"]) / num_responses,
        "readable": 1 - lost / num_responses,
    }
    draft = TaskReadiness(**measured, judgement=_judge(signal[group_size]), reasons=(), advice=())
    return TaskReadiness(
        **measured, judgement=draft.judgement, reasons=_reasons(draft), advice=_advice(draft)
    )


def _powers_of_two(m: int) -> list[int]:
    return [*(2**power for power in range(m.bit_length()) if 2**power < m), m]


def _judge(signal: Interval) -> Judgement:
    if signal.low >= MIN_SIGNAL:
        return "would learn"
    return "would hardly learn" if signal.high < MIN_SIGNAL else "borderline"


def _reasons(one: TaskReadiness) -> tuple[str, ...]:
    signal = one.signal_at_group_size
    lines = [
        f"{with_ends(signal)} of its groups of {one.group_size} hold both a right and a wrong answer and carry a gradient"
        f" ({'at least' if one.judgement == 'would learn' else 'wanted:'} {MIN_SIGNAL:.0%})",
        f"of {one.num_questions} questions {percent(one.never.value)} are never right in {one.num_samples} samples, "
        f"{percent(one.sometimes.value)} sometimes, {percent(one.always.value)} always",
    ]
    if one.judgement != "would learn":
        lines.append(_cause(one))
    if one.ended < MIN_FORM_SHARE:
        lines.append(f"only {percent(one.ended)} of its responses end by themselves")
    if one.readable < MIN_FORM_SHARE:
        lines.append(
            f"only {percent(one.readable)} state an answer that can be read: the form is the first thing RL would teach"
        )
    return tuple(lines)


def is_too_easy(one: TaskReadiness) -> bool:
    """Whether groups lack a gradient because all of them is right, rather than all of them wrong."""
    return one.average.value >= 0.5


def main_fault(one: TaskReadiness) -> Status:
    """What is the matter with most of the responses that are not correct."""
    return max(FAULTS, key=lambda status: one.faults[str(status)])


def _cause(one: TaskReadiness) -> str:
    if is_too_easy(one):
        return f"too easy: {percent(one.average.value)} of its responses are right already, and equal rewards teach nothing"
    fault = main_fault(one)
    word = {Status.WRONG: "too hard", Status.UNPARSABLE: "unreadable", Status.TRUNCATED: "does not end"}[
        fault
    ]
    return f"{word}: {percent(one.average.value)} of its responses are right, {percent(one.faults[str(fault)])} {FAULTS[fault]}"


def _advice(one: TaskReadiness) -> tuple[str, ...]:
    room = one.passed[one.num_samples].value - one.average.value
    if one.judgement == "would learn":
        return (
            f"room: answers that it already finds, made more probable, would raise Avg@{one.num_samples} by up to "
            f"{100 * room:.0f} points to Pass@{one.num_samples} = {percent(one.passed[one.num_samples].value)}",
        )
    if is_too_easy(one):
        return ("pose harder problems",)
    lines = {
        Status.WRONG: "pose easier problems, or mid-train longer on worked solutions",
        Status.UNPARSABLE: "show it how an answer is stated: mid-training or supervised fine-tuning on worked solutions",
        Status.TRUNCATED: "train on whole documents with their end-of-text token, or raise max_new_tokens if responses need it",
    }
    return (lines[main_fault(one)], _larger_groups(one))


def _larger_groups(one: TaskReadiness) -> str:
    shares = ", ".join(f"{percent(value.value)} at {size}" for size, value in one.signal.items())
    enough = next((size for size, value in one.signal.items() if value.value >= MIN_SIGNAL), None)
    if enough is None:
        return f"no group size that {one.num_samples} samples can tell of would reach {MIN_SIGNAL:.0%}: with a gradient are {shares}"
    return f"groups of {enough} would reach {MIN_SIGNAL:.0%}: with a gradient are {shares}"


def percent(share: float) -> str:
    """A share as a percentage, and never 0% or 100% for what is not.

    >>> percent(0.031), percent(0.0004), percent(1.0), percent(0.9996)
    ('3.1%', '<0.1%', '100%', '>99.9%')
    """
    if share in (0, 1):
        return f"{share:.0%}"
    if share < 0.001:
        return "<0.1%"
    return ">99.9%" if share > 0.999 else f"{share:.1%}"


def with_ends(one: Interval) -> str:
    """A share with its 95% interval."""
    return f"{percent(one.value)} ({100 * one.low:.0f} to {100 * one.high:.0f})"


def verdict_sentence(label: str, one: TaskReadiness) -> str:
    """The verdict on one task and why, in one sentence."""
    verb = "is borderline" if one.judgement == "borderline" else one.judgement
    return f"{label} {verb} on {one.task}: {'; '.join(one.reasons)}."


def compare_models(models: Sequence[ModelReadiness], task: str) -> list[str]:
    """Sentences across models: who would learn, and whose signal is larger than whose by more than chance."""
    by_judgement: dict[str, list[str]] = {}
    for model in models:
        by_judgement.setdefault(model.tasks[task].judgement, []).append(model.label)
    size = models[0].tasks[task].group_size
    order: tuple[Judgement, ...] = ("would learn", "borderline", "would hardly learn")
    parts = [
        f"{word}: {f'all {len(models)} models' if len(labels) == len(models) > 1 else ', '.join(labels)}"
        for word in order
        if (labels := by_judgement.get(word))
    ]
    lines = [f"{task}: {'; '.join(parts)}."]
    if len(models) > 1:
        lines.append(_compare_signal(models, task, size))
    return lines


def _compare_signal(models: Sequence[ModelReadiness], task: str, size: int) -> str:
    """The largest signal against each other one, paired by question; Bonferroni over the comparisons."""
    ranked = sorted(models, key=lambda model: -model.tasks[task].signal[size].value)
    values = {model.label: _signal_by_question(model, task, size) for model in ranked}
    best, *others = ranked
    if best.tasks[task].signal[size].value == 0:
        return f"signal@{size} is 0 for all of them."
    level = 1 - 0.05 / len(others)
    lower: list[str] = []
    for other in others:
        shared = [key for key in values[best.label] if key in values[other.label]]
        gaps = [values[best.label][key] - values[other.label][key] for key in shared]
        if difference_interval(gaps, level=level).low > 0:
            lower.append(other.label)
    equal = [other.label for other in others if other.label not in lower]
    share = percent(best.tasks[task].signal[size].value)
    text = f"{best.label} has the largest signal@{size}, {share}"
    if lower:
        text += f"; larger than chance (paired by question, corrected for {len(others)} comparisons) above {', '.join(lower)}"
    return text + (f"; not told apart from {', '.join(equal)}." if equal else ".")


def _signal_by_question(model: ModelReadiness, task: str, size: int) -> dict[str, float]:
    columns = model.result["tasks"][task]
    values = signal_at_g(columns["num_samples"], np.array(columns["num_correct"]), size)
    return dict(zip(columns["problem_ids"], values.tolist(), strict=True))


def tasks_of(models: Sequence[ModelReadiness]) -> list[str]:
    """Names of the tasks, which all models share."""
    return list(models[0].tasks) if models else []


def forking_shares(models: Sequence[ModelReadiness]) -> tuple[float, list[float]]:
    """The first model's 80th percentile of entropy on held-out text, in nats, and the share of each model's tokens above it."""
    quantiles = [model.result["text"]["entropy_quantiles_nats"] for model in models]
    threshold = forking_threshold(quantiles[0])
    return threshold, [share_above(one, threshold) for one in quantiles]


def share_one_tokenizer(models: Sequence[ModelReadiness]) -> bool:
    """Whether nats per token, forking tokens and head masses of the models compare."""
    return len({model.result["tokenizer"] for model in models}) == 1


def text_rows(models: Sequence[ModelReadiness]) -> list[dict[str, Any]]:
    """Likelihood numbers of each model, for a table."""
    _, shares = forking_shares(models)
    rows: list[dict[str, Any]] = []
    for model, share in zip(models, shares, strict=True):
        text = model.result["text"]
        solutions = [task["solutions"] for task in model.result["tasks"].values() if task["solutions"]]
        responses = [task["responses"] for task in model.result["tasks"].values()]
        rows.append(
            {
                "label": model.label,
                "bits_per_byte": text["bits_per_byte"],
                "perplexity": text["perplexity"],
                "entropy_nats": text["entropy_nats"],
                "fork_share": share,
                "head_mass": text["head_mass"],
                "tail_mass": text["tail_mass"],
                "top_k": text["top_k"],
                "calibration_error": text["calibration_error"],
                "response_entropy_nats": _mean(responses, "entropy_nats"),
                "solution_nats": _mean(solutions, "cross_entropy_nats"),
                "end_prob": _mean(solutions, "end_prob", weight="num_documents"),
            }
        )
    return rows


def _mean(parts: Sequence[Mapping[str, Any]], name: str, *, weight: str = "num_tokens") -> float:
    """Mean over tokens, or over documents, of several materials; nan without any."""
    total = sum(part[weight] for part in parts)
    return sum(part[name] * part[weight] for part in parts) / total if total else math.nan
