"""Whether what readiness measures before RL predicts what RL makes of a model: rank correlations over the runs of a study."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlprior.config import UsageError
from rlprior.evaluation.record import Record, TaskScores
from rlprior.seeding import numpy_generator
from rlprior.statistics.estimators import avg_at_m, pass_at_k, signal_at_g
from rlprior.study.analysis import task_names
from rlprior.study.results import Study

LEVEL = 0.95
MIN_RUNS = 10
"""Below so many runs the interval of a strong correlation covers less than 93% (0.66 of 95% at 5 runs and rho 0.95), by simulation."""
FEWEST_RUNS = 4
"""Fewer have no interval: its width holds 1 / (n - 3)."""
OUTCOMES = ("score after RL", "gain by RL")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Rank correlation of one quantity before RL with an outcome of RL, over runs (arms x seeds).

    Attributes:
        task: whose score RL changed.
        predictor, outcome: what is correlated.
        rho: Spearman's.
        low, high: its interval at `level`, corrected for the number of predictors.
        num_runs: how many.
        decided: the interval leaves out 0.
        seed_rhos: the same within each seed, where arms differ and the seed does not; of the seeds with three arms or more.
    """

    task: str
    predictor: str
    outcome: str
    rho: float
    low: float
    high: float
    level: float
    num_runs: int
    decided: bool
    seed_rhos: tuple[float, ...]


@dataclass(frozen=True)
class _Run:
    """One arm under one seed, before and after RL."""

    seed: int
    before: Record
    after: Record


def predict(study: Study, *, group_size: int) -> list[Prediction]:
    """Every predictor against every outcome, task by task.

    Quantities of a task before RL are taken from one random half of its questions, outcomes from the other: chance in the choice of
    questions or in their samples, which the score before RL shares with the gain, is then no part of the correlation.

    Args:
        study: with finished evaluations before and after RL.
        group_size: G of signal@G, reduced to the samples that there are.

    Raises:
        UsageError: fewer than four runs are finished.
    """
    stages = [stage for stage in study.stages if stage != "rl"]
    pairs = [
        (seed, study.final(arm.name, seed, stages[-1]), study.final(arm.name, seed, "rl"))
        for arm in study.arms
        for seed in study.seeds
        if stages
    ]
    runs = [_Run(seed, before, after) for seed, before, after in pairs if before and after]
    if len(runs) < FEWEST_RUNS:
        raise UsageError(
            f"{study.name}: {len(runs)} runs are evaluated before and after RL; a rank correlation needs {FEWEST_RUNS} at least"
        )
    return [
        one
        for task in task_names(study)
        if all(task in run.before.tasks and task in run.after.tasks for run in runs)
        for one in _predict_task(runs, task, group_size)
    ]


def _predict_task(runs: Sequence[_Run], task: str, group_size: int) -> list[Prediction]:
    columns = {
        name: [quantity(run) for run in runs]
        for name, quantity in {**_TEXT, **_task_quantities(runs, task, group_size)}.items()
        if all(run.before.likelihood for run in runs) or name not in _TEXT
    }
    varied = {name: values for name, values in columns.items() if len(set(values)) > 1}
    before = [_average(run.before.tasks[task]) for run in runs]
    after = [_average(run.after.tasks[task]) for run in runs]
    outcomes = dict(zip(OUTCOMES, (np.array(after), np.subtract(after, before)), strict=True))
    level = 1 - (1 - LEVEL) / max(1, len(varied))
    seeds = np.array([run.seed for run in runs])
    return [
        _correlate(task, name, outcome, np.array(values), results, seeds, level)
        for outcome, results in outcomes.items()
        for name, values in varied.items()
    ]


_TEXT: Mapping[str, Callable[[_Run], float]] = {
    "entropy on text": lambda run: _per_token(run.before, "entropy_nats"),
    "cross-entropy on text": lambda run: _per_token(run.before, "cross_entropy_nats"),
    "head mass on text": lambda run: _per_token(run.before, "head_mass"),
}


def _task_quantities(runs: Sequence[_Run], task: str, group_size: int) -> dict[str, Callable[[_Run], float]]:
    m = min(run.before.tasks[task].num_samples for run in runs)
    size = min(group_size, m)

    def of_first_half(estimate: Callable[[TaskScores], npt.NDArray[np.float64]]) -> Callable[[_Run], float]:
        return lambda run: float(estimate(run.before.tasks[task])[_halves(run.before.tasks[task])[0]].mean())

    return {
        f"Avg@{m}": of_first_half(lambda one: avg_at_m(one.num_samples, one.num_correct)),
        f"Pass@{m}": of_first_half(lambda one: pass_at_k(one.num_samples, one.num_correct, m)),
        f"signal@{size}": of_first_half(lambda one: signal_at_g(one.num_samples, one.num_correct, size)),
        f"Cons@{m}": of_first_half(lambda one: one.consensus),
        "share cut": of_first_half(lambda one: one.num_truncated / one.num_samples),
        "share unreadable": of_first_half(lambda one: one.num_unparsable / one.num_samples),
    }


def _average(scores: TaskScores) -> float:
    return float(avg_at_m(scores.num_samples, scores.num_correct)[_halves(scores)[1]].mean())


def _halves(scores: TaskScores) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the questions of either half: at random, because their order goes round families and difficulties."""
    num_questions = len(scores.problem_ids)
    order = numpy_generator(0, "prediction halves", num_questions).permutation(num_questions)
    return np.sort(order[: num_questions // 2]), np.sort(order[num_questions // 2 :])


def _per_token(checkpoint: Record, name: str) -> float:
    likelihood = checkpoint.likelihood
    if likelihood is None:
        return math.nan
    return float(getattr(likelihood, name).sum() / likelihood.num_tokens.sum())


def _correlate(
    task: str,
    predictor: str,
    outcome: str,
    values: npt.NDArray[np.float64],
    results: npt.NDArray[np.float64],
    seeds: npt.NDArray[np.int64],
    level: float,
) -> Prediction:
    rho = spearman(values, results)
    low, high = rank_correlation_interval(rho, len(values), level=level)
    within = [
        spearman(values[seeds == seed], results[seeds == seed])
        for seed in dict.fromkeys(seeds.tolist())
        if (seeds == seed).sum() >= 3
    ]
    return Prediction(
        task=task,
        predictor=predictor,
        outcome=outcome,
        rho=rho,
        low=low,
        high=high,
        level=level,
        num_runs=len(values),
        decided=low > 0 or high < 0,
        seed_rhos=tuple(within),
    )


def spearman(values: npt.NDArray[np.float64], results: npt.NDArray[np.float64]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where either side is constant.

    >>> spearman(np.array([1.0, 2.0, 4.0]), np.array([0.1, 0.3, 0.2]))
    0.5
    """
    if np.ptp(values) == 0 or np.ptp(results) == 0:
        return 0.0
    return round(float(np.corrcoef(stats.rankdata(values), stats.rankdata(results))[0, 1]), 12)


def rank_correlation_interval(rho: float, num_runs: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Interval of Spearman's correlation: tanh(atanh(rho) -+ z sqrt((1 + rho^2 / 2) / (n - 3))).

    Ranks that agree in all places (rho = 1 or -1) are taken as if one pair of neighbours were exchanged, and the near end stays at rho.

    Simulated coverage of 95% on bivariate normal pairs, rho from 0 to 0.95: 0.93 to 0.97 at 10, 15 and 25 runs.

    Source: Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman correlations", Psychometrika 65, 2000.

    >>> [round(end, 3) for end in rank_correlation_interval(0.5, 25)]
    [0.106, 0.758]
    """
    largest = 1 - 12 / (num_runs * (num_runs**2 - 1))
    inside = min(max(rho, -largest), largest)
    reach = float(stats.norm.ppf(0.5 + level / 2)) * math.sqrt((1 + inside**2 / 2) / (num_runs - 3))
    low, high = math.tanh(math.atanh(inside) - reach), math.tanh(math.atanh(inside) + reach)
    return min(low, rho), max(high, rho)


def prediction_sentences(found: Sequence[Prediction]) -> list[str]:
    """What readiness predicted in this study and what it did not, in words that follow from the intervals."""
    lines: list[str] = []
    for task in dict.fromkeys(one.task for one in found):
        for outcome in OUTCOMES:
            family = [one for one in found if (one.task, one.outcome) == (task, outcome)]
            decided = sorted((one for one in family if one.decided), key=lambda one: -abs(one.rho))
            num_runs = family[0].num_runs
            if decided:
                words = ", ".join(f"{one.predictor} ({_signed(one)})" for one in decided)
                silent = ", ".join(one.predictor for one in family if not one.decided)
                rest = f"; not {silent}" if silent else ""
                lines.append(f"{task}: the {outcome} is predicted by {words} over {num_runs} runs{rest}.")
            else:
                strongest = max(family, key=lambda one: abs(one.rho))
                lines.append(
                    f"{task}: the {outcome} is not predicted by anything measured before RL over {num_runs} runs; the strongest "
                    f"correlation, {_signed(strongest)} with {strongest.predictor}, may be chance."
                )
    return lines


def prediction_cautions(study: Study, found: Sequence[Prediction]) -> list[str]:
    """What speaks against taking the correlations at their word."""
    num_runs = found[0].num_runs if found else 0
    cautions = [
        f"Runs of one seed share initial weights and data ({len(study.seeds)} seeds for {num_runs} runs), so the intervals, which take "
        "runs as independent, may be too narrow."
    ]
    if num_runs < MIN_RUNS:
        cautions.append(
            f"{num_runs} runs are few: only the strongest correlations could be told from chance."
        )
    return cautions


def _signed(one: Prediction) -> str:
    rho, low, high = (
        f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") for value in (one.rho, one.low, one.high)
    )
    return f"{rho}, {low} to {high}"
