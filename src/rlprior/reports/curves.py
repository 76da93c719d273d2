"""The numbers behind the figures: one curve an arm, over tokens, steps or k."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlprior.evaluation.record import Record, TaskScores
from rlprior.statistics.comparisons import Interval, Measurement, difference, estimate
from rlprior.study.analysis import measure_documents, measure_questions, to_perplexity
from rlprior.study.results import Study


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One arm's values along an axis.

    Attributes:
        x, values: places and means over seeds.
        low, high: least and greatest seed where there are several, else equal to `values`; a curve over k has intervals here.
        last: interval of the last point; None before the last checkpoint is evaluated.
    """

    arm: str
    x: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    last: Interval | None = None


Measure = Callable[[Record], Measurement | None]


def text_curves(study: Study, quantity: str, *, against_baseline: bool = False) -> list[Curve]:
    """A quantity of held-out text over training tokens, on the documents that every checkpoint was evaluated on.

    "perplexity" is the exponential of the cross-entropy; the others are those of `measure_documents`.
    """
    name = "cross_entropy" if quantity == "perplexity" else quantity
    shared = shared_documents(study)

    def measure(checkpoint: Record) -> Measurement | None:
        if checkpoint.likelihood is None:
            return None
        return _restrict(measure_documents(checkpoint.likelihood, name), shared)

    return _curves_over_tokens(
        study, measure, against_baseline, to_perplexity if quantity == "perplexity" else None
    )


def score_curves(study: Study, task: str, score: str, k: int) -> list[Curve]:
    """A score in points over training tokens before RL, on the questions that every checkpoint was evaluated on."""
    shared = shared_questions(study, task)
    return _curves_over_tokens(study, lambda checkpoint: _measure_task(checkpoint, task, score, k, shared))


def rl_curves(study: Study, task: str, score: str, k: int, num_samples: int | None = None) -> list[Curve]:
    """A score in points over RL steps; step 0 is the model that RL starts from.

    Args:
        num_samples: leave out checkpoints with another pool size (the majority vote depends on it); None keeps all.
    """
    shared = shared_questions(study, task)

    def measure(checkpoint: Record) -> Measurement | None:
        scores = checkpoint.tasks.get(task)
        if scores is None or (num_samples is not None and scores.num_samples != num_samples):
            return None
        return _measure_task(checkpoint, task, score, k, shared)

    curves: list[Curve] = []
    for arm in study.arms:
        by_seed: list[dict[float, Measurement]] = []
        for seed in study.seeds:
            points: dict[float, Measurement] = {}
            start = _start_of_rl(study, arm.name, seed)
            run = study.runs.get((arm.name, seed, "rl"))
            placed = [(0.0, start)] if start else []
            placed += [(float(c.step), c) for c in run.checkpoints] if run else []
            for step, checkpoint in placed:
                if found := measure(checkpoint):
                    points[step] = found
            by_seed.append(points)
        finished = any(
            checkpoint is not None and measure(checkpoint) is not None
            for checkpoint in (study.final(arm.name, seed, "rl") for seed in study.seeds)
        )
        curves += _join_seeds(arm.name, by_seed, finished=finished)
    return curves


def metric_curves(study: Study, name: str) -> list[Curve]:
    """A metric that RL training logged, over RL steps, mean over seeds."""
    curves: list[Curve] = []
    for arm in study.arms:
        by_step: dict[float, list[float]] = {}
        for seed in study.seeds:
            run = study.runs.get((arm.name, seed, "rl"))
            for record in run.metrics if run else ():
                if isinstance(record.get(name), int | float) and math.isfinite(record[name]):
                    by_step.setdefault(float(record["step"]), []).append(float(record[name]))
        if by_step:
            curves.append(_from_values(arm.name, by_step))
    return curves


def pass_curves(study: Study, task: str, stage: str) -> list[Curve]:
    """Pass@k in points over k = 1, 2, 4, ... m at a stage's end, with its interval at each k."""
    finals = {
        arm.name: [
            checkpoint.tasks[task]
            for seed in study.seeds
            if (checkpoint := study.final(arm.name, seed, stage)) and task in checkpoint.tasks
        ]
        for arm in study.arms
    }
    curves: list[Curve] = []
    for arm, pools in finals.items():
        if not pools:
            continue
        ks = powers_of_two(min(pool.num_samples for pool in pools))
        intervals = [estimate([measure_questions(pool, "pass", k) for pool in pools]) for k in ks]
        curves.append(
            Curve(
                arm=arm,
                x=tuple(float(k) for k in ks),
                values=tuple(one.value for one in intervals),
                low=tuple(one.low for one in intervals),
                high=tuple(one.high for one in intervals),
                last=intervals[-1],
            )
        )
    return curves


def guessing_curve(study: Study, task: str) -> Curve | None:
    """Pass@k in points of giving the k most frequent of all right answers to every question."""
    finals = [study.final(*key) for key in study.runs]
    pools = [final.tasks[task] for final in finals if final is not None and task in final.tasks]
    guesses = next((pool.baseline_pass_at_k for pool in pools if pool.baseline_pass_at_k), ())
    if not guesses:
        return None
    ks = powers_of_two(len(guesses))
    values = tuple(100 * guesses[k - 1] for k in ks)
    return Curve(arm="", x=tuple(float(k) for k in ks), values=values, low=values, high=values)


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest` itself.

    >>> powers_of_two(12)
    [1, 2, 4, 8, 12]
    """
    return sorted({2**i for i in range(largest.bit_length())} | {largest})


def smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the points, over those there are at the ends."""
    reach = max(1, len(values) // 20)
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def stage_boundaries(study: Study) -> list[tuple[str, float, float]]:
    """(stage, first token, last token) of each stage before RL, as far as evaluated."""
    boundaries: list[tuple[str, float, float]] = []
    start = 0.0
    for stage in (stage for stage in study.stages if stage != "rl"):
        ends = [c.tokens for run in study.runs.values() if run.stage == stage for c in run.checkpoints]
        if ends:
            boundaries.append((stage, start, float(max(ends))))
            start = float(max(ends))
    return boundaries


def pool_sizes(study: Study, task: str, stages: Sequence[str]) -> list[int]:
    """The different numbers of samples per question among the checkpoints of some stages, rising."""
    return sorted({scores.num_samples for stage, scores in _all_scores(study, task) if stage in stages})


def shared_questions(study: Study, task: str) -> frozenset[str]:
    """Questions that every checkpoint was evaluated on."""
    return _shared_ids([scores.problem_ids for _, scores in _all_scores(study, task)])


def shared_documents(study: Study) -> frozenset[str]:
    """Documents that every checkpoint was evaluated on."""
    checkpoints = (c for run in study.runs.values() if run.stage != "rl" for c in run.checkpoints)
    return _shared_ids([c.likelihood.document_ids for c in checkpoints if c.likelihood])


def _all_scores(study: Study, task: str) -> list[tuple[str, TaskScores]]:
    return [
        (run.stage, c.tasks[task]) for run in study.runs.values() for c in run.checkpoints if task in c.tasks
    ]


def _shared_ids(sets: Sequence[Sequence[str]]) -> frozenset[str]:
    return frozenset.intersection(*map(frozenset, sets)) if sets else frozenset()


def _restrict(one: Measurement, ids: frozenset[str]) -> Measurement:
    keep = [index for index, unit in enumerate(one.ids) if unit in ids]
    return dataclasses.replace(
        one,
        ids=tuple(one.ids[index] for index in keep),
        amounts=one.amounts[keep],
        weights=one.weights[keep],
    )


def _measure_task(
    checkpoint: Record, task: str, score: str, k: int, shared: frozenset[str]
) -> Measurement | None:
    scores = checkpoint.tasks.get(task)
    return _restrict(measure_questions(scores, score, k), shared) if scores else None


def _start_of_rl(study: Study, arm: str, seed: int) -> Record | None:
    stages = [stage for stage in study.stages if stage != "rl"]
    return study.final(arm, seed, stages[-1]) if stages else None


def _is_finished(study: Study, arm: str, stage: str) -> bool:
    return any(study.final(arm, seed, stage) for seed in study.seeds)


def _curves_over_tokens(
    study: Study,
    measure: Measure,
    against_baseline: bool = False,
    transform: Callable[[float], float] | None = None,
) -> list[Curve]:
    stages = [stage for stage in study.stages if stage != "rl"]

    def points(arm: str, seed: int) -> dict[float, Measurement]:
        runs = [study.runs[arm, seed, stage] for stage in stages if (arm, seed, stage) in study.runs]
        found = {float(c.tokens): measure(c) for run in runs for c in run.checkpoints}
        return {tokens: one for tokens, one in found.items() if one is not None}

    curves: list[Curve] = []
    for arm in (arm.name for arm in study.arms):
        by_seed = [points(arm, seed) for seed in study.seeds]
        if against_baseline:
            reference = [points(study.baseline, seed) for seed in study.seeds]
            by_seed = [
                {x: difference(one, other[x]) for x, one in mine.items() if x in other}
                for mine, other in zip(by_seed, reference, strict=True)
            ]
        curves += _join_seeds(
            arm, by_seed, transform, finished=bool(stages) and _is_finished(study, arm, stages[-1])
        )
    return curves


def _join_seeds(
    arm: str,
    by_seed: Sequence[dict[float, Measurement]],
    transform: Callable[[float], float] | None = None,
    *,
    finished: bool,
) -> list[Curve]:
    """The curve of an arm, or none where nothing is measured."""
    apply = transform or (lambda value: value)
    by_x: dict[float, list[Measurement]] = {}
    for points in by_seed:
        for x, one in points.items():
            by_x.setdefault(x, []).append(one)
    if not by_x:
        return []
    last = None
    if finished:
        raw = estimate(by_x[max(by_x)])
        last = dataclasses.replace(raw, value=apply(raw.value), low=apply(raw.low), high=apply(raw.high))
    return [_from_values(arm, {x: [apply(one.value) for one in found] for x, found in by_x.items()}, last)]


def _from_values(arm: str, by_x: dict[float, list[float]], last: Interval | None = None) -> Curve:
    places = sorted(by_x)
    return Curve(
        arm=arm,
        x=tuple(places),
        values=tuple(float(np.mean(by_x[x])) for x in places),
        low=tuple(min(by_x[x]) for x in places),
        high=tuple(max(by_x[x]) for x in places),
        last=last,
    )
