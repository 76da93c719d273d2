"""Two evaluations of the same questions, compared question by question: `rlprior compare A B`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError
from rlprior.evaluation.record import SETTINGS, FloatArray, TaskScores, read_records
from rlprior.statistics.estimators import avg_at_m, pass_at_k
from rlprior.statistics.intervals import (
    LEVEL,
    Interval,
    difference_interval,
    holm,
    sampling_difference,
    sampling_interval,
)


@dataclass(frozen=True)
class Metric:
    """ "avg", "cons", or "pass" at k samples."""

    name: str
    k: int = 1

    @classmethod
    def parse(cls, text: str) -> Metric:
        """Read `avg`, `cons` or `pass@K`.

        Raises:
            UsageError: anything else.

        >>> Metric.parse("pass@8")
        Metric(name='pass', k=8)
        """
        if text in ("avg", "cons"):
            return cls(text)
        if not re.fullmatch(r"pass@[1-9][0-9]*", text):
            raise UsageError(f"--metric {text}: no such metric; write avg, cons or pass@K, as in pass@8")
        return cls("pass", int(text.removeprefix("pass@")))

    def __str__(self) -> str:
        return {"avg": "Avg@m", "cons": "Cons@m", "pass": f"Pass@{self.k}"}[self.name]

    @property
    def verb(self) -> str:
        """What a model does that this metric counts, with the model's name to fill in."""
        return {
            "avg": "{} answers",
            "cons": "{}'s majority vote answers",
            "pass": f"{{}} answers in {self.k} {'try' if self.k == 1 else 'tries'}",
        }[self.name]

    def values(self, scores: TaskScores, rows: Sequence[int]) -> FloatArray:
        """Score of each of these questions, in [0, 1]."""
        correct = scores.num_correct[list(rows)]
        if self.name == "avg":
            return avg_at_m(scores.num_samples, correct)
        if self.name == "pass":
            return pass_at_k(scores.num_samples, correct, self.k)
        return scores.consensus[list(rows)]

    def obstacle(self, first: TaskScores, second: TaskScores) -> str:
        """Why a benchmark cannot be compared by this metric; empty where it can."""
        fewest = min(first.num_samples, second.num_samples)
        if self.name == "pass" and fewest < self.k:
            return f"{self} needs {self.k} samples of a question and there are {fewest}"
        if self.name == "cons" and first.num_samples != second.num_samples:
            return f"votes among {first.num_samples} and among {second.num_samples} samples are no comparison"
        if self.name == "cons" and not (len(first.consensus) and len(second.consensus)):
            return "no votes were counted"
        return ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One benchmark.

    Attributes:
        num_left_out: questions of the first and of the second that the other lacks.
        scores: means of the first and of the second over the common questions, in [0, 1].
        difference: second minus first, over questions like these.
        same_questions: the same on these very questions with other samples; None where there are too few samples to tell.
        corrected_p: p-value corrected for all benchmarks by Holm's method.
    """

    benchmark: str
    num_left_out: tuple[int, int]
    num_samples: tuple[int, int]
    scores: tuple[float, float]
    difference: Interval
    same_questions: Interval | None
    corrected_p: float

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the second is, after correction; "alone" where it is before correction only; else "undecided"."""
        if self.corrected_p < 1 - LEVEL:
            return "better" if self.difference.value > 0 else "worse"
        return "alone" if self.difference.low > 0 or self.difference.high < 0 else "undecided"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All benchmarks that two evaluations share, and what a reader must know beside the numbers."""

    metric: Metric
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def read_evaluation(folder: Path) -> Mapping[str, TaskScores]:
    """TaskScores of each task and benchmark of the last checkpoint that `rlprior evaluate` measured into `folder`.

    Raises:
        UsageError: the folder is no evaluation, or holds no benchmarks.
    """
    try:
        records = read_records(folder)
    except RunError as error:
        raise UsageError(f"{error}; give a folder that `rlprior evaluate` wrote") from error
    if not records or not records[-1].tasks:
        raise UsageError(
            f"{folder}: no evaluation of benchmarks there; give a folder that `rlprior evaluate` wrote"
        )
    return records[-1].tasks


def compare_evaluations(
    first: Mapping[str, TaskScores], second: Mapping[str, TaskScores], metric: Metric
) -> Comparison:
    """Second minus first on each benchmark that both have, paired by question.

    Raises:
        UsageError: there is no benchmark to compare.
    """
    notes = [
        (name, f"only in {label}")
        for label, mine, other in (("A", first, second), ("B", second, first))
        for name in mine
        if name not in other
    ]
    pairs: dict[str, tuple[TaskScores, TaskScores, list[tuple[int, int]]]] = {}
    for name in (name for name in first if name in second):
        left, right = first[name], second[name]
        position = {problem: index for index, problem in enumerate(right.problem_ids)}
        common = [(i, position[one]) for i, one in enumerate(left.problem_ids) if one in position]
        obstacle = metric.obstacle(left, right) if common else "no question in common"
        if obstacle:
            notes.append((name, f"left out, {obstacle}"))
            continue
        pairs[name] = left, right, common
        notes += [(name, note) for note in _describe_mismatches(left, right, len(common))]
    if not pairs:
        raise UsageError("nothing to compare: " + "; ".join(_gather_notes(notes)))
    rows = _compare_pairs(pairs, metric)
    notes += [(row.benchmark, row.difference.warning) for row in rows if row.difference.warning]
    return Comparison(metric=metric, rows=rows, notes=_gather_notes(notes))


def _gather_notes(notes: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """One line for all benchmarks of which the same is to be said."""
    names: dict[str, list[str]] = {}
    for name, note in notes:
        names.setdefault(note, []).append(name)
    return tuple(f"{', '.join(of)}: {note}" for note, of in names.items())


def _describe_mismatches(left: TaskScores, right: TaskScores, num_common: int) -> list[str]:
    found = []
    for label, one in (("A", left), ("B", right)):
        if len(one.problem_ids) > num_common:
            num_left_out = len(one.problem_ids) - num_common
            found.append(
                f"{num_left_out} of {len(one.problem_ids)} questions of {label} left out, which the other lacks"
            )
    if left.num_samples != right.num_samples:
        found.append(f"{left.num_samples} samples a question in A, {right.num_samples} in B")
    for name in SETTINGS:
        a, b = (one.settings.get(name, "not recorded") for one in (left, right))
        if a != b:
            found.append(f"{name} is {a} in A and {b} in B: the difference is that of more than the models")
    return found


def _compare_pairs(
    pairs: Mapping[str, tuple[TaskScores, TaskScores, list[tuple[int, int]]]], metric: Metric
) -> tuple[Row, ...]:
    measured = []
    for left, right, common in pairs.values():
        rows, columns = zip(*common, strict=True)
        a, b = metric.values(left, rows), metric.values(right, columns)
        noises = [_noise(one, places, metric) for one, places in ((left, rows), (right, columns))]
        same_questions = sampling_difference(noises[0], noises[1]) if noises[0] and noises[1] else None
        measured.append(((float(a.mean()), float(b.mean())), difference_interval(b - a), same_questions))
    p_values = holm([difference.p_value or 0.0 for _, difference, _ in measured])
    return tuple(
        Row(
            benchmark=name,
            num_left_out=(len(left.problem_ids) - len(common), len(right.problem_ids) - len(common)),
            num_samples=(left.num_samples, right.num_samples),
            scores=scores,
            difference=difference,
            same_questions=same_questions,
            corrected_p=corrected,
        )
        for (name, (left, right, common)), (scores, difference, same_questions), corrected in zip(
            pairs.items(), measured, p_values, strict=True
        )
    )


def _noise(scores: TaskScores, places: Sequence[int], metric: Metric) -> Interval | None:
    if metric.name == "cons" or scores.num_samples < 2 * metric.k:
        return None
    return sampling_interval(scores.num_samples, scores.num_correct[list(places)], metric.k)


def sentence(row: Row, metric: Metric, num_benchmarks: int) -> str:
    """The benchmark's outcome in words, which follow from the interval and the corrected p-value."""
    one = row.difference
    size = f"{_points(one.low)} to {_points(one.high)}; {one.num_questions} questions"
    if row.verdict == "undecided":
        return (
            f"{row.benchmark}: no difference larger than chance could make "
            f"(B - A {_points(one.value)} points, 95% interval {size})."
        )
    verdict = "more than chance explains"
    if row.verdict == "alone":
        verdict += f" for this benchmark alone, but not for one picked among {num_benchmarks}"
    direction = "more" if one.value > 0 else "fewer"
    return (
        f"{row.benchmark}: {metric.verb.format('B')} {100 * abs(one.value):.1f} points {direction} of these questions "
        f"than A (95% interval {size}): {verdict}."
    )


def describe(comparison: Comparison) -> str:
    """Table, sentences and notes, as the command prints them."""
    metric, rows = comparison.metric, comparison.rows
    header = ("benchmark", "questions", "A", "B", "B - A", "like these", "these", "p")
    cells = [
        (
            row.benchmark,
            str(row.difference.num_questions),
            *(f"{100 * score:.1f}" for score in row.scores),
            _points(row.difference.value),
            _span(row.difference),
            _span(row.same_questions),
            f"{row.corrected_p:.2g}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    correction = f", corrected for {len(rows)} benchmarks by Holm's method" if len(rows) > 1 else ""
    lines = [
        f"{metric} in points over the questions that both have, and 95% intervals of B - A",
        "  like these: had other questions of the kind been asked",
        "  these: had the models answered these very questions once more (- where too few samples tell)",
        f"  p: of no difference on questions like these{correction}",
        "",
    ]
    for line in (header, *cells):
        name, *numbers = (f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join([f"{name.strip():<{widths[0]}}", *numbers]))
    lines += ["", *(sentence(row, metric, len(rows)) for row in rows)]
    if len(rows) > 1:
        lines.append(count_verdicts(rows))
    if comparison.notes:
        lines += ["", *(f"note: {note}" for note in comparison.notes)]
    return "\n".join(lines)


def count_verdicts(rows: Sequence[Row]) -> str:
    """How many benchmarks are decided, in a sentence."""
    better, worse = (sum(row.verdict == verdict for row in rows) for verdict in ("better", "worse"))
    return (
        f"Of {len(rows)} benchmarks, after Holm's correction, B is better than A on {better} and worse on {worse}; on "
        f"{len(rows) - better - worse} chance could make the difference."
    )


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Plain data for JSON; scores and differences in [0, 1] and [-1, 1]."""
    rows = comparison.rows
    return {
        "format": 1,
        "metric": str(comparison.metric),
        "level": LEVEL,
        "correction": f"Holm, {len(rows)} benchmarks" if len(rows) > 1 else "none, one benchmark",
        "benchmarks": {
            row.benchmark: {
                "num_questions": row.difference.num_questions,
                "num_left_out": row.num_left_out,
                "num_samples": row.num_samples,
                "scores": row.scores,
                "difference": row.difference.value,
                "questions_like_these": [row.difference.low, row.difference.high],
                "these_questions": row.same_questions and [row.same_questions.low, row.same_questions.high],
                "p_value": row.difference.p_value,
                "corrected_p_value": row.corrected_p,
                "verdict": row.verdict,
                "sentence": sentence(row, comparison.metric, len(rows)),
                "warning": row.difference.warning,
            }
            for row in rows
        },
        "notes": comparison.notes,
    }


def _points(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return text if text.strip("+-0.") else "0.0"


def _span(interval: Interval | None) -> str:
    return f"{_points(interval.low)} to {_points(interval.high)}" if interval else "-"
