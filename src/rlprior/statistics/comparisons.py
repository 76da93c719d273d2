"""Intervals for a study's numbers, and sentences whose wording is computed from the interval.

A number is a ratio of sums over the units of chance: nats over the tokens of documents, points over questions. With one seed the
interval covers the choice of documents or questions; with several it covers the seed, documents and questions held fixed.

Methods were chosen by simulated coverage at a nominal 95%. For one score at 30 questions (uniform, hard with mean 0.09, very hard 0.03,
easy, bimodal) the percentile bootstrap fell to 0.84, the studentised one stayed within 0.94-0.98. For paired differences of such scores the
studentised bootstrap fell to 0.86, Student's t stayed within 0.91-0.97. For ratios over documents whose log-lengths have a standard
deviation of 0.5 to 1.5, Student's t at the effective number of documents stayed within 0.93-0.96; with n degrees of freedom it fell to
0.82, the studentised bootstrap to 0.88. Where the effect grows with the length too, all of them fall short: 0.91 at 1.0, 0.75 at 1.5.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlprior.config import RunError
from rlprior.seeding import numpy_generator

FloatArray = npt.NDArray[np.float64]

LEVEL = 0.95
# Below these the simulated coverage of nominal 95% intervals drops under 0.93.
MIN_UNITS = 30
MIN_DISTANCE_FROM_EDGE_POINTS = 5.0
# At the 0.3% tails of the largest corrections, 12 of these resamples lie beyond the quantile.
NUM_RESAMPLES = 4000


@dataclass(frozen=True)
class Measurement:
    """A ratio of sums over units of chance: value = sum(amounts) / sum(weights).

    Attributes:
        ids: name of each unit.
        amounts: the unit's share of the numerator.
        weights: the unit's share of the denominator: tokens of a document, 1 for a question.
        unit_of_chance: "documents" or "questions".
        bounds: least and greatest value that a unit's ratio can take, where there are such.
        paired: amounts are differences between two measurements of the same unit.
    """

    ids: tuple[str, ...]
    amounts: FloatArray
    weights: FloatArray
    unit_of_chance: str
    bounds: tuple[float, float] | None = None
    paired: bool = False

    @property
    def value(self) -> float:
        """sum(amounts) / sum(weights)."""
        return float(self.amounts.sum() / self.weights.sum())


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number with its interval.

    Attributes:
        value: the estimate.
        low, high: ends of the interval at `level`.
        n: how many units of chance.
        unit_of_chance: what the interval covers the choice of: "documents", "questions" or "seeds".
        method: how it was made.
        warning: why its coverage may fall short; empty where nothing speaks against it.
    """

    value: float
    low: float
    high: float
    level: float
    n: int
    unit_of_chance: str
    method: str
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Difference `subject` minus `reference` of one quantity, with its interval and the decisions that follow from it.

    Attributes:
        effect, low, high: the difference and its interval at `level`, in `unit`.
        n, unit_of_chance: what the interval covers the choice of.
        decided: the interval leaves out 0.
        family_size: comparisons that ask the same question; Bonferroni's correction is for as many.
        decided_in_family: the interval at level 1 - (1 - level) / family_size leaves out 0 too.
        seed_effects: the difference under each seed, in their order.
    """

    quantity: str
    subject: str
    reference: str
    unit: str
    effect: float
    low: float
    high: float
    level: float
    n: int
    unit_of_chance: str
    decided: bool
    family_size: int
    decided_in_family: bool
    method: str
    warning: str = ""
    seed_effects: tuple[float, ...] = ()


def difference(left: Measurement, right: Measurement) -> Measurement:
    """`left - right`, unit by unit, over the units that both have.

    Raises:
        RunError: no unit in common, or one unit with two weights (two tokenizers, say).
    """
    position = {unit: index for index, unit in enumerate(right.ids)}
    rows = [index for index, unit in enumerate(left.ids) if unit in position]
    ids = tuple(left.ids[index] for index in rows)
    columns = [position[unit] for unit in ids]
    if not ids or left.unit_of_chance != right.unit_of_chance:
        raise RunError(
            f"no {left.unit_of_chance} in common to pair: were the runs evaluated on different data?"
        )
    if not np.array_equal(left.weights[rows], right.weights[columns]):
        raise RunError("a document has different token counts in two runs: they used different tokenizers")
    bounds = None
    if left.bounds and right.bounds:
        bounds = (left.bounds[0] - right.bounds[1], left.bounds[1] - right.bounds[0])
    return Measurement(
        ids=ids,
        amounts=left.amounts[rows] - right.amounts[columns],
        weights=left.weights[rows],
        unit_of_chance=left.unit_of_chance,
        bounds=bounds,
        paired=True,
    )


def estimate(measurements: Sequence[Measurement], *, level: float = LEVEL) -> Interval:
    """Value and interval of a quantity measured under one seed or more.

    Args:
        measurements: one per seed. Several: Student's t over the seeds' values. One: over its documents or questions, Student's t for
            ratios over documents and for paired differences, the studentised bootstrap for scores.
        level: coverage aimed at, in (0, 1).

    Raises:
        RunError: there is nothing to measure.
    """
    if not measurements:
        raise RunError("no finished run to measure")
    if len(measurements) > 1:
        return _seed_interval(measurements, level)
    (only,) = measurements
    value, n = only.value, len(only.ids)
    error = _standard_error(only.amounts, only.weights)
    if error <= 1e-12 * max(1.0, abs(value)):
        low, high, method = (*_constant_interval(only, level), "exact bound for equal values")
    elif only.bounds and not only.paired:
        low, high, method = _studentised_interval(only, error, level)
    else:
        quantile = float(stats.t.ppf(0.5 + level / 2, max(effective_size(only.weights) - 1, 1)))
        low, high, method = value - quantile * error, value + quantile * error, "Student's t"
    if only.bounds:
        low, high = max(low, only.bounds[0]), min(high, only.bounds[1])
    return Interval(
        value=value,
        low=low,
        high=high,
        level=level,
        n=n,
        unit_of_chance=only.unit_of_chance,
        method=method,
        warning=_warning(only),
    )


def compare(
    measurements: Sequence[Measurement],
    *,
    quantity: str,
    subject: str,
    reference: str,
    unit: str,
    family_size: int = 1,
    level: float = LEVEL,
) -> Comparison:
    """Whether paired differences (one measurement per seed, made by `difference`) are larger than chance.

    Args:
        measurements: `difference(subject, reference)` under each seed.
        quantity, subject, reference, unit: words for `sentence`.
        family_size: how many comparisons ask the same question, for Bonferroni's correction.
        level: coverage aimed at, in (0, 1).
    """
    interval = estimate(measurements, level=level)
    corrected = estimate(measurements, level=1 - (1 - level) / family_size)
    return Comparison(
        quantity=quantity,
        subject=subject,
        reference=reference,
        unit=unit,
        effect=interval.value,
        low=interval.low,
        high=interval.high,
        level=level,
        n=interval.n,
        unit_of_chance=interval.unit_of_chance,
        decided=_excludes_zero(interval),
        family_size=family_size,
        decided_in_family=_excludes_zero(corrected),
        method=interval.method,
        warning=interval.warning,
        seed_effects=tuple(measurement.value for measurement in measurements),
    )


def sentence(comparison: Comparison) -> str:
    """The comparison in words; direction and verdict come from the interval.

    >>> print(sentence(Comparison(quantity="Entropy", subject="A", reference="B", unit="nats", effect=-0.03, low=-0.04,
    ...     high=-0.02, level=0.95, n=212, unit_of_chance="documents", decided=True, family_size=1,
    ...     decided_in_family=True, method="t")))
    Entropy: A is lower than B by 0.030 nats (95% interval 0.020 to 0.040 over 212 documents): larger than chance.
    """
    one = comparison
    place = f"over {one.n} {one.unit_of_chance}"
    if len(one.seed_effects) > 1:
        num_higher, num_lower = (sum(sign * effect > 0 for effect in one.seed_effects) for sign in (1, -1))
        direction, count = ("higher", num_higher) if one.effect > 0 else ("lower", num_lower)
        place += f", {direction} in {count}"
    percent = f"{100 * one.level:g}% interval"
    number = functools.partial(format_number, decimals=useful_decimals(one.low, one.high))
    if not one.decided:
        ends = f"{number(one.low, signed=True)} to {number(one.high, signed=True)}"
        return (
            f"{one.quantity}: {one.subject} and {one.reference} cannot be told apart (difference "
            f"{number(one.effect, signed=True)} {one.unit}, {percent} {ends} {place})."
        )
    word = "higher" if one.effect > 0 else "lower"
    near, far = sorted((abs(one.low), abs(one.high)))
    verdict = "larger than chance"
    if one.family_size > 1:
        verdict += (
            f", also after correction for {one.family_size} comparisons"
            if one.decided_in_family
            else f" taken alone, but not after correction for {one.family_size} comparisons"
        )
    return (
        f"{one.quantity}: {one.subject} is {word} than {one.reference} by {number(abs(one.effect))} {one.unit} "
        f"({percent} {number(near)} to {number(far)} {place}): {verdict}."
    )


def format_number(value: float, decimals: int = 1, *, signed: bool = False) -> str:
    """A number with so many decimals, a true minus sign, and a plus sign on request; a rounded zero has no sign.

    >>> format_number(0.0312, 3), format_number(-5.217, signed=True), format_number(-0.01, signed=True)
    ('0.031', '−5.2', '0.0')
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    text = f"{abs(value):,.{decimals}f}"
    if not text.strip("0.,"):
        return text
    return ("−" if value < 0 else "+" if signed else "") + text


def useful_decimals(low: float, high: float) -> int:
    """Decimals, at least 1, at which an interval's half-width shows one or two digits.

    >>> useful_decimals(0.054, 0.071), useful_decimals(7.5, 11.5)
    (3, 1)
    """
    half_width = (high - low) / 2
    if not math.isfinite(half_width) or half_width <= 0:
        return 3
    return min(6, max(1, -math.floor(math.log10(half_width / 4))))


def _excludes_zero(interval: Interval) -> bool:
    return interval.low > 0 or interval.high < 0


def _standard_error(amounts: FloatArray, weights: FloatArray) -> float:
    """Linearised standard error of sum(amounts) / sum(weights) over independent units; 0 for one unit."""
    n, total = len(amounts), weights.sum()
    residuals = amounts - amounts.sum() / total * weights
    return float(np.sqrt((residuals @ residuals) * n / max(n - 1, 1)) / total)


def _seed_interval(measurements: Sequence[Measurement], level: float) -> Interval:
    values = np.array([measurement.value for measurement in measurements])
    bounds = measurements[0].bounds
    n, value = len(values), float(values.mean())
    spread = float(values.std(ddof=1))
    warning = ""
    if spread <= 1e-12 * max(1.0, abs(value)):
        # Scores come in steps: a few seeds can agree by chance, and that says nothing about the spread of others.
        single = [estimate([one], level=level) for one in measurements]
        low, high = min(one.low for one in single), max(one.high for one in single)
        warning = f"the {n} seeds agree exactly, which leaves no spread to judge by; the interval is that of one seed"
    else:
        half_width = float(stats.t.ppf(0.5 + level / 2, n - 1)) * spread / math.sqrt(n)
        low, high = value - half_width, value + half_width
    if bounds:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(
        value=value,
        low=low,
        high=high,
        level=level,
        n=n,
        unit_of_chance="seeds",
        method="Student's t over seeds",
        warning=warning,
    )


def _constant_interval(one: Measurement, level: float) -> tuple[float, float]:
    """Interval where every unit has one value: bounded values may still differ on a share of units too rare to have been seen.

    With probability `level` at least, that share is at most 1 - (1 - level)^(1/n).
    """
    value = one.value
    if one.bounds is None:
        return (value, value) if len(one.ids) > 1 else (-math.inf, math.inf)
    unseen = 1 - (1 - level) ** (1 / len(one.ids))
    return value + unseen * (one.bounds[0] - value), value + unseen * (one.bounds[1] - value)


@functools.lru_cache(maxsize=4)
def _resample_counts(n: int) -> FloatArray:
    """How often each of n units is drawn in each resample, [NUM_RESAMPLES, n]: one set for all, so that results repeat."""
    counts = numpy_generator(0, "bootstrap", n).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    return counts.astype(np.float64)


def _studentised_interval(one: Measurement, error: float, level: float) -> tuple[float, float, str]:
    """Bootstrap of (mean - value) / error over units of weight 1."""
    n = len(one.ids)
    counts = _resample_counts(n)
    means = counts @ one.amounts / n
    errors = np.sqrt(np.maximum(counts @ one.amounts**2 / n - means**2, 0) / (n - 1))
    shifts = means - one.value
    # A resample of equal units has no error: its statistic is infinite, on the side to which it fell.
    flat = errors <= 1e-6 * error
    pivots = np.divide(shifts, errors, out=np.zeros_like(shifts), where=~flat)
    pivots[flat & (shifts > 0)] = np.inf
    pivots[flat & (shifts < 0)] = -np.inf
    tails = [(1 - level) / 2, (1 + level) / 2]
    lowest, highest = np.quantile(pivots, tails, method="inverted_cdf")
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        low, high = _effective_size_interval(one, error, level)
        return low, high, "Clopper-Pearson at the effective sample size"
    return float(one.value - highest * error), float(one.value - lowest * error), "studentised bootstrap"


def _effective_size_interval(one: Measurement, error: float, level: float) -> tuple[float, float]:
    """Exact binomial interval at the number of yes-or-no units that would have this standard error.

    Source: Korn and Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated from
    survey data", Survey Methodology 24, 1998.
    """
    least, greatest = one.bounds or (0.0, 1.0)
    span = greatest - least
    share = (one.value - least) / span
    tail = (1 - level) / 2
    shrink = float(stats.norm.ppf(1 - tail) / stats.t.ppf(1 - tail, len(one.ids) - 1)) ** 2
    size = share * (1 - share) / (error / span) ** 2 * shrink
    low = float(stats.beta.ppf(tail, share * size, (1 - share) * size + 1))
    high = float(stats.beta.ppf(1 - tail, share * size + 1, (1 - share) * size))
    return least + span * low, least + span * high


def effective_size(weights: FloatArray) -> float:
    """Number of units of equal weight that would average as well: sum(w)^2 / sum(w^2).

    >>> effective_size(np.array([3.0, 1.0]))
    1.6
    """
    return float(weights.sum() ** 2 / (weights**2).sum())


def _warning(one: Measurement) -> str:
    effective = effective_size(one.weights)
    if effective < MIN_UNITS:
        same = len(one.ids) - effective < 0.5
        how = "" if same else f" (their lengths differ so much that they count as {effective:.0f})"
        return f"{len(one.ids)} {one.unit_of_chance}{how} are few: the interval may be too narrow"
    if one.bounds and not one.paired:
        edge = min(one.value - one.bounds[0], one.bounds[1] - one.value)
        if edge < MIN_DISTANCE_FROM_EDGE_POINTS:
            return "the mean is close to an end of its range: the interval may be too narrow"
    changed = int((one.amounts != 0).sum())
    if one.paired and one.unit_of_chance == "questions" and changed < MIN_UNITS // 3:
        return "few questions changed: the interval may be too narrow"
    return ""
