"""Intervals of a benchmark's score and of the difference between two models, and when not to trust them.

One idea makes all three: two invented observations, one at each end of the range, and then the textbook interval. The invented ones stand for
what few questions may have missed, which a spread near 0 hides; at many questions they weigh nothing. Of the methods in
`bench/intervals` these are the ones whose simulated coverage holds: see "Intervals" in `results/README.md`.

Questions are the units of chance. Resampling the samples of a question instead would be biased: of 128 samples with one correct, Pass@64 is
0.5, and 0.395 on the average over resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlprior.statistics.estimators import pass_at_k, pass_at_k_variance

FloatArray = npt.NDArray[np.float64]

LEVEL = 0.95
# Below these the simulated coverage of nominal 95% intervals is unknown, for a score, or can be less than 93%, for a difference.
MIN_QUESTIONS_OF_SCORE = 30
MIN_QUESTIONS_OF_DIFFERENCE = 100
MIN_SPREADING = 4
# Scores that are equal on paper, from different numbers of samples, may differ by as little.
ROUNDING = 1e-12
LIKE_THESE = "questions like these"
THESE = "these questions, other samples"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over questions with its interval.

    Attributes:
        value: the mean.
        low, high: ends of the interval at `level`.
        num_questions: how many questions.
        covers: what the interval allows to be otherwise: `LIKE_THESE` or `THESE`.
        p_value: of a true mean of 0, for differences: below 1 - level exactly where the interval leaves out 0.
        warning: why the coverage may fall short; empty where nothing speaks against it.
    """

    value: float
    low: float
    high: float
    level: float
    num_questions: int
    covers: str
    p_value: float | None = None
    warning: str = ""


def score_interval(values: npt.ArrayLike, *, level: float = LEVEL) -> Interval:
    """Interval of the mean score over questions like these.

    Student's t over the n values and two invented ones, 0 and 1, cut to [0, 1].

    Args:
        values: score of each question, [n], in [0, 1]: Avg@m, Pass@k, Cons@k, or 0 and 1.
        level: coverage aimed at, in (0, 1).

    Raises:
        ValueError: no values, or values out of range.

    Source: Agresti and Coull, The American Statistician 52, 1998, who invent two successes and two failures for a proportion.

    >>> one = score_interval([0.0] * 99 + [1.0])
    >>> print(f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})")
    0.010 (0.000 to 0.047)
    """
    scores = _check_values(values, 0.0, 1.0)
    mean, error, quantile = _mean_with_ends(scores, 0.0, 1.0, level)
    return Interval(
        value=float(scores.mean()),
        low=max(0.0, mean - quantile * error),
        high=min(1.0, mean + quantile * error),
        level=level,
        num_questions=len(scores),
        covers=LIKE_THESE,
        warning="" if len(scores) >= MIN_QUESTIONS_OF_SCORE else f"{len(scores)} questions are few",
    )


def difference_interval(differences: npt.ArrayLike, *, level: float = LEVEL) -> Interval:
    """Interval of the mean difference between two models over questions like these, paired by question.

    Student's t over the n differences and two invented ones, plus and minus the largest that was seen (1 where none was), cut to [-1, 1].

    Args:
        differences: score of one model minus score of the other on each question, [n], in [-1, 1].
        level: coverage aimed at, in (0, 1).

    Raises:
        ValueError: no values, or values out of range.

    >>> one = difference_interval([0.25] * 30 + [-0.25] * 10)
    >>> print(f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f}), p = {one.p_value:.4f}")
    0.125 (0.050 to 0.188), p = 0.0012
    """
    changes = _check_values(differences, -1.0, 1.0)
    largest = float(np.abs(changes).max())
    if largest <= ROUNDING:
        largest = 1.0
    mean, error, quantile = _mean_with_ends(changes, -largest, largest, level)
    return Interval(
        value=float(changes.mean()),
        low=max(-1.0, mean - quantile * error),
        high=min(1.0, mean + quantile * error),
        level=level,
        num_questions=len(changes),
        covers=LIKE_THESE,
        p_value=2 * float(stats.t.sf(abs(mean) / error, len(changes) + 1)),
        warning=doubt(changes),
    )


def sampling_interval(
    num_samples: int, num_correct: npt.NDArray[np.integer[Any]], k: int = 1, *, level: float = LEVEL
) -> Interval:
    """Interval of Avg@m (k = 1) or Pass@k on these very questions: what other samples of the same model could have given.

    The variance of the sum is that of the questions' estimates, unbiased, and that of two invented groups of k samples, one that answers and
    one that does not.

    Args:
        num_samples: m, samples per question, at least 2k: the noise of fewer cannot be estimated.
        num_correct: correct ones of each question, integers [n].
        k: samples of Pass@k.
        level: coverage aimed at, in (0, 1).

    Raises:
        ValueError: no questions, counts out of range, or m < 2k.

    >>> one = sampling_interval(16, np.array([0, 4, 16]))
    >>> print(f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})")
    0.417 (0.344 to 0.496)
    """
    if len(num_correct) == 0:
        raise ValueError("no questions to make an interval of")
    _check_level(level)
    estimates = pass_at_k(num_samples, num_correct, k)
    variances = pass_at_k_variance(num_samples, num_correct, k)
    groups_per_question = num_samples / k
    num_groups = len(estimates) * groups_per_question
    mean = (float(estimates.sum()) * groups_per_question + 1) / (num_groups + 2)
    variance = float(variances.sum()) * groups_per_question**2 + mean**2 + (1 - mean) ** 2
    half_width = float(stats.norm.ppf(0.5 + level / 2)) * math.sqrt(variance) / (num_groups + 2)
    return Interval(
        value=float(estimates.mean()),
        low=max(0.0, mean - half_width),
        high=min(1.0, mean + half_width),
        level=level,
        num_questions=len(estimates),
        covers=THESE,
    )


def sampling_difference(first: Interval, second: Interval) -> Interval:
    """Interval of second minus first on these very questions, from that of each by itself: the reaches add in quadrature.

    Exact to that order where the models' samples are independent, and too wide where the same random numbers draw both.

    Args:
        first, second: `sampling_interval` of two models on the same questions at one level.

    Source: Zou and Donner, Statistics in Medicine 27, 2008 (the "method of variance estimates recovery").
    """
    value = second.value - first.value
    down = math.hypot(second.value - second.low, first.high - first.value)
    up = math.hypot(second.high - second.value, first.value - first.low)
    return replace(second, value=value, low=max(-1.0, value - down), high=min(1.0, value + up))


def doubt(differences: FloatArray) -> str:
    """One sentence that says why the interval of a difference may be too narrow; empty where nothing speaks against it.

    A few large changes among many small ones are what few questions miss, and what their spread then does not show. Where nothing changed at
    all, the invented changes of 1 make up for it.

    Args:
        differences: score of one model minus score of the other on each question, [n].

    >>> doubt(np.array([0.5] * 30))
    '30 questions are few: the interval may be too narrow'
    >>> doubt(np.array([1.0] + [0.01] * 199))
    'the spread comes from about 1 of 200 questions: the interval may be too narrow'
    """
    n = len(differences)
    spreading = spreading_questions(differences)
    if n < MIN_QUESTIONS_OF_DIFFERENCE:
        return f"{n} questions are few: the interval may be too narrow"
    if 0 < spreading < MIN_SPREADING:
        return f"the spread comes from about {spreading:.0f} of {n} questions: the interval may be too narrow"
    return ""


def spreading_questions(differences: FloatArray) -> float:
    """How many changes as large as the largest would spread as these do: sum d^2 / max d^2, 0 where nothing changed.

    >>> spreading_questions(np.array([0.0, 0.5, -0.5])), spreading_questions(np.array([1.0, 0.5, 0.5]))
    (2.0, 1.5)
    """
    largest = float(np.abs(differences).max())
    return float(differences @ differences) / largest**2 if largest > ROUNDING else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for as many comparisons: the chance of even one false alarm stays below the threshold that they are held to.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.

    >>> holm([0.03, 0.01, 0.5])
    [0.06, 0.03, 0.5]
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _mean_with_ends(
    values: FloatArray, least: float, greatest: float, level: float
) -> tuple[float, float, float]:
    """Mean of the values and two invented ones, its standard error, and how many of those the interval reaches to either side."""
    _check_level(level)
    n = len(values) + 2
    mean = (float(values.sum()) + least + greatest) / n
    shifts = values - mean
    squares = float(shifts @ shifts) + (least - mean) ** 2 + (greatest - mean) ** 2
    return mean, math.sqrt(squares / (n - 1) / n), _t_quantile(level, n - 1)


@functools.lru_cache(maxsize=128)
def _t_quantile(level: float, degrees: int) -> float:
    return float(stats.t.ppf(0.5 + level / 2, degrees))


def _check_values(values: npt.ArrayLike, least: float, greatest: float) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(
            f"an interval needs one value for each question, not an array of shape {array.shape}"
        )
    if not (array.min() >= least and array.max() <= greatest):
        raise ValueError(f"values must lie between {least:g} and {greatest:g}")
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level = {level} must be between 0 and 1")
