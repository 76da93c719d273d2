"""What a study's evaluations say: numbers with intervals, and the comparisons between arms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlprior.evaluation.record import Likelihood, Record, TaskScores
from rlprior.statistics.comparisons import Comparison, Interval, Measurement, compare, difference, estimate
from rlprior.statistics.estimators import avg_at_m, pass_at_k
from rlprior.study.results import Study

POINTS = 100.0
NATS = "nats per token"
SCORES = ("avg", "cons", "pass")

DOCUMENT_SUMS: Mapping[str, Callable[[Likelihood], np.ndarray]] = {
    "entropy": lambda one: one.entropy_nats,
    "cross_entropy": lambda one: one.cross_entropy_nats,
    "excess_entropy": lambda one: one.entropy_nats - one.cross_entropy_nats,
    "head_mass": lambda one: one.head_mass,
    "unigram_cross_entropy": lambda one: one.unigram_cross_entropy_nats,
}
DOCUMENT_LABELS = {
    "entropy": "Entropy",
    "cross_entropy": "Cross-entropy",
    "excess_entropy": "Entropy minus cross-entropy",
}


def measure_documents(one: Likelihood, quantity: str) -> Measurement:
    """A quantity of `DOCUMENT_SUMS` per held-out token."""
    return Measurement(one.document_ids, DOCUMENT_SUMS[quantity](one), one.num_tokens, "documents")


def measure_bits_per_byte(one: Likelihood) -> Measurement:
    """Cross-entropy in bits per byte of text, which does not depend on the tokenizer."""
    return Measurement(one.document_ids, one.cross_entropy_nats / math.log(2), one.num_bytes, "documents")


def measure_questions(one: TaskScores, score: str, k: int) -> Measurement:
    """Avg@m, Cons@m or Pass@k of each question, in points from 0 to 100."""
    values = {
        "avg": lambda: avg_at_m(one.num_samples, one.num_correct),
        "cons": lambda: one.consensus,
        "pass": lambda: pass_at_k(one.num_samples, one.num_correct, k),
    }[score]()
    return Measurement(one.problem_ids, POINTS * values, np.ones(len(values)), "questions", (0.0, POINTS))


@dataclass(frozen=True, kw_only=True)
class ArmLikelihood:
    """Held-out text under one arm's model before RL; None where no seed is finished."""

    arm: str
    label: str
    num_seeds: int
    entropy: Interval | None
    perplexity: Interval | None
    excess_entropy: Interval | None
    head_mass: Interval | None
    bits_per_byte: Interval | None
    unigram_perplexity: Interval | None


@dataclass(frozen=True, kw_only=True)
class ArmScores:
    """Scores of one arm in one task, in points; keys are `SCORES`."""

    arm: str
    label: str
    before: Mapping[str, Interval]
    after: Mapping[str, Interval]
    gain: Mapping[str, Comparison]
    truncated_share: tuple[float | None, float | None]
    unparsable_share: tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class TaskAnalysis:
    """One task: the arms' scores, and how the arms differ from the baseline arm, keyed by score.

    Attributes:
        num_samples: samples per question, m.
        k: the k of Pass@k, m / 2 as in the paper (64 of 128).
        before, after, gain: comparisons with the baseline arm, one an arm: before RL, after it, and of what RL added.
    """

    name: str
    num_samples: int
    k: int
    num_questions: int
    temperature: float
    top_p: float
    max_new_tokens: int
    baseline_accuracy: float | None
    rows: tuple[ArmScores, ...]
    before: Mapping[str, tuple[Comparison, ...]]
    after: Mapping[str, tuple[Comparison, ...]]
    gain: Mapping[str, tuple[Comparison, ...]]

    def score_label(self, score: str) -> str:
        """Name with its number of samples, for example Pass@8."""
        return {
            "avg": f"Avg@{self.num_samples}",
            "cons": f"Cons@{self.num_samples}",
            "pass": f"Pass@{self.k}",
        }[score]

    @property
    def beats_guessing(self) -> bool:
        """Whether every arm answers better before RL than the most frequent answer would."""
        before = [row.before["avg"].value for row in self.rows if "avg" in row.before]
        return bool(before) and min(before) > 100 * (self.baseline_accuracy or 0)

    @property
    def rl_gains(self) -> dict[str, tuple[Comparison, ...]]:
        """After minus before RL of each arm, keyed by score."""
        return {score: tuple(row.gain[score] for row in self.rows if score in row.gain) for score in SCORES}


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything the report states. `base_stage` is the stage that RL starts from."""

    base_stage: str | None
    likelihood: tuple[ArmLikelihood, ...]
    likelihood_comparisons: Mapping[str, tuple[Comparison, ...]]
    tasks: tuple[TaskAnalysis, ...]

    @property
    def main_task(self) -> TaskAnalysis | None:
        """The task that the headline is about: the first that the models can do at all, or else the first."""
        able = [task for task in self.tasks if task.beats_guessing]
        return next(iter([*able, *self.tasks]), None)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """All comparisons, text first, then task by task."""
        found = [one for family in self.likelihood_comparisons.values() for one in family]
        for task in self.tasks:
            for families in (task.rl_gains, task.before, task.after, task.gain):
                found += [one for family in families.values() for one in family]
        return tuple(found)


def analyse(study: Study) -> Analysis:
    """Measure every arm before and after RL, and compare each with the baseline arm, over the seeds finished so far."""
    stages = [stage for stage in study.stages if stage != "rl"]
    base = stages[-1] if stages else None
    return Analysis(
        base_stage=base,
        likelihood=tuple(_arm_likelihood(study, base, arm.name, arm.label) for arm in study.arms),
        likelihood_comparisons={
            quantity: _against_baseline(study, base, quantity) for quantity in DOCUMENT_LABELS
        },
        tasks=tuple(_analyse_task(study, base, name) for name in task_names(study)),
    )


def task_names(study: Study) -> list[str]:
    """Names of the tasks in the order in which they were evaluated."""
    checkpoints = (checkpoint for run in study.runs.values() for checkpoint in run.checkpoints)
    return list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tasks))


def _finals(study: Study, stage: str | None, arm: str) -> dict[int, Record]:
    """Final evaluation of an arm's stage by seed, as far as finished."""
    found = {seed: study.final(arm, seed, stage) for seed in study.seeds} if stage else {}
    return {seed: checkpoint for seed, checkpoint in found.items() if checkpoint is not None}


def _arm_likelihood(study: Study, base: str | None, arm: str, label: str) -> ArmLikelihood:
    finals = _finals(study, base, arm).values()
    likelihoods = [one.likelihood for one in finals if one.likelihood is not None]

    def interval(quantity: str) -> Interval | None:
        return estimate([measure_documents(one, quantity) for one in likelihoods]) if likelihoods else None

    bits = estimate([measure_bits_per_byte(one) for one in likelihoods]) if likelihoods else None
    return ArmLikelihood(
        arm=arm,
        label=label,
        num_seeds=len(likelihoods),
        entropy=interval("entropy"),
        perplexity=_exponential(interval("cross_entropy")),
        excess_entropy=interval("excess_entropy"),
        head_mass=interval("head_mass"),
        bits_per_byte=bits,
        unigram_perplexity=_exponential(interval("unigram_cross_entropy")),
    )


def _exponential(one: Interval | None) -> Interval | None:
    if one is None:
        return None
    return dataclasses.replace(
        one, value=to_perplexity(one.value), low=to_perplexity(one.low), high=to_perplexity(one.high)
    )


def to_perplexity(cross_entropy_nats: float) -> float:
    """exp(cross-entropy), infinite where a float cannot hold it.

    >>> to_perplexity(0.0), to_perplexity(1e6)
    (1.0, inf)
    """
    return math.exp(cross_entropy_nats) if cross_entropy_nats < 700 else math.inf


def _against_baseline(study: Study, base: str | None, quantity: str) -> tuple[Comparison, ...]:
    reference = _finals(study, base, study.baseline)
    paired: dict[str, list[Measurement]] = {}
    for arm in (arm.name for arm in study.arms if arm.name != study.baseline):
        for seed, checkpoint in _finals(study, base, arm).items():
            other = reference.get(seed)
            if checkpoint.likelihood and other and other.likelihood:
                left = measure_documents(checkpoint.likelihood, quantity)
                right = measure_documents(other.likelihood, quantity)
                paired.setdefault(arm, []).append(difference(left, right))
    return _compare_with_baseline(study, paired, DOCUMENT_LABELS[quantity], NATS)


def _compare_with_baseline(
    study: Study, paired: Mapping[str, Sequence[Measurement]], quantity: str, unit: str
) -> tuple[Comparison, ...]:
    """Each arm against the baseline; the family is every arm of the study but the baseline, finished or not."""
    labels = {arm.name: arm.label for arm in study.arms}
    return tuple(
        compare(
            measurements,
            quantity=quantity,
            subject=labels[arm],
            reference=labels[study.baseline],
            unit=unit,
            family_size=len(labels) - 1,
        )
        for arm, measurements in paired.items()
    )


@dataclass(frozen=True)
class _TaskPool:
    """Final scores of one task by (arm, "before" or "after" RL), then by seed."""

    scores: Mapping[tuple[str, str], Mapping[int, TaskScores]]
    num_samples: int

    @property
    def k(self) -> int:
        return max(1, self.num_samples // 2)

    def measure(self, arm: str, when: str, score: str) -> dict[int, Measurement]:
        """An arm's score by seed, before or after RL, or its "gain": after minus before, paired by question."""
        if when == "gain":
            return _pair(self.measure(arm, "after", score), self.measure(arm, "before", score))
        return {seed: measure_questions(one, score, self.k) for seed, one in self.scores[arm, when].items()}


def _pair(left: Mapping[int, Measurement], right: Mapping[int, Measurement]) -> dict[int, Measurement]:
    return {seed: difference(one, right[seed]) for seed, one in left.items() if seed in right}


def _analyse_task(study: Study, base: str | None, name: str) -> TaskAnalysis:
    stages = {"before": base, "after": "rl"}
    scores = {
        (arm.name, when): {
            seed: checkpoint.tasks[name]
            for seed, checkpoint in _finals(study, stage, arm.name).items()
            if name in checkpoint.tasks
        }
        for arm in study.arms
        for when, stage in stages.items()
    }
    shown = [one for by_seed in scores.values() for one in by_seed.values()]
    if not shown:
        shown = [c.tasks[name] for run in study.runs.values() for c in run.checkpoints if name in c.tasks]
    pool = _TaskPool(scores, min(one.num_samples for one in shown))
    words = {"avg": f"Avg@{pool.num_samples}", "cons": f"Cons@{pool.num_samples}", "pass": f"Pass@{pool.k}"}
    versus = {
        when: {
            score: _scores_against_baseline(study, pool, when, score, quantity.format(words[score], name))
            for score in SCORES
        }
        for when, quantity in {
            "before": "{} before RL ({})",
            "after": "{} after RL ({})",
            "gain": "Gain in {} by RL ({})",
        }.items()
    }
    return TaskAnalysis(
        name=name,
        num_samples=pool.num_samples,
        k=pool.k,
        num_questions=len(shown[0].problem_ids),
        temperature=shown[0].temperature,
        top_p=shown[0].top_p,
        max_new_tokens=shown[0].max_new_tokens,
        baseline_accuracy=shown[0].baseline_accuracy,
        rows=tuple(_arm_scores(study, pool, arm.name, arm.label, words, name) for arm in study.arms),
        **versus,
    )


def _scores_against_baseline(
    study: Study, pool: _TaskPool, when: str, score: str, quantity: str
) -> tuple[Comparison, ...]:
    reference = pool.measure(study.baseline, when, score)
    paired = {
        arm.name: list(_pair(pool.measure(arm.name, when, score), reference).values())
        for arm in study.arms
        if arm.name != study.baseline
    }
    return _compare_with_baseline(
        study, {arm: found for arm, found in paired.items() if found}, quantity, "points"
    )


def _arm_scores(
    study: Study, pool: _TaskPool, arm: str, label: str, words: Mapping[str, str], task: str
) -> ArmScores:
    def intervals(when: str) -> dict[str, Interval]:
        measured = {score: list(pool.measure(arm, when, score).values()) for score in SCORES}
        return {score: estimate(found) for score, found in measured.items() if found}

    gains = {score: list(pool.measure(arm, "gain", score).values()) for score in SCORES}
    pools = [list(pool.scores[arm, when].values()) for when in ("before", "after")]
    return ArmScores(
        arm=arm,
        label=label,
        before=intervals("before"),
        after=intervals("after"),
        gain={
            score: compare(
                found,
                quantity=f"{words[score]} ({task})",
                subject=f"{label} after RL",
                reference=f"{label} before RL",
                unit="points",
                family_size=len(study.arms),
            )
            for score, found in gains.items()
            if found
        },
        truncated_share=_shares(pools, lambda one: one.num_truncated),
        unparsable_share=_shares(pools, lambda one: one.num_unparsable),
    )


def _shares(
    pools: Sequence[Sequence[TaskScores]], count: Callable[[TaskScores], np.ndarray]
) -> tuple[float | None, float | None]:
    """Share of the responses that `count` counts, before and after RL, all seeds together; None where there are none."""
    shares = [
        sum(float(count(one).sum()) for one in pool)
        / sum(one.num_samples * len(one.problem_ids) for one in pool)
        if pool
        else None
        for pool in pools
    ]
    return shares[0], shares[1]
