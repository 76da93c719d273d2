"""Intervals that were considered: ends for many trials at once. The chosen ones are in `rlprior.statistics.intervals`.

Values are [trials, questions]; what comes back are the lower and the upper ends, [trials].
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]
Ends = tuple[FloatArray, FloatArray]

TAIL = 0.025
NUM_RESAMPLES = 1000


def students_t(values: FloatArray) -> Ends:
    """Mean and standard error."""
    mean, error = _mean_and_error(values)
    reach = stats.t.ppf(1 - TAIL, values.shape[1] - 1) * error
    return mean - reach, mean + reach


def percentile_bootstrap(values: FloatArray) -> Ends:
    """Quantiles of the means of resamples."""
    means = (values.astype(np.float32) @ _resamples(values.shape[1]).T) / values.shape[1]
    return _quantiles(means)


def studentised_bootstrap(values: FloatArray) -> Ends:
    """Quantiles of resamples' t statistics; Clopper-Pearson's at the effective size where they are infinite, for scores."""
    n = values.shape[1]
    mean, error = _mean_and_error(values)
    scale = np.where(error > 0, error, 1)
    centred = ((values - mean[:, None]) / scale[:, None]).astype(np.float32)
    shifts = centred @ _resamples(n).T / n
    squares = centred**2 @ _resamples(n).T / n
    errors = np.sqrt(np.maximum(squares - shifts**2, 0) / (n - 1))
    # A resample of equal values has an infinite statistic, on the side to which it fell; 1e-3 is above float32's rounding of 0.
    flat = errors <= 1e-3
    infinite = np.where(
        shifts > 0, np.float32(np.inf), np.where(shifts < 0, np.float32(-np.inf), np.float32(0))
    )
    pivots = np.divide(shifts, errors, out=infinite, where=~flat)
    lowest, highest = np.quantile(pivots, [TAIL, 1 - TAIL], axis=1, method="inverted_cdf")
    sound = np.isfinite(lowest) & np.isfinite(highest) & (error > 0)
    low, high = clopper_pearson_at_effective_size(values) if values.min() >= 0 else students_t(values)
    low = np.where(sound, mean - np.where(sound, highest, 0) * error, low)
    return low, np.where(sound, mean - np.where(sound, lowest, 0) * error, high)


def clopper_pearson_at_effective_size(values: FloatArray) -> Ends:
    """Exact binomial interval at the number of yes-or-no questions that would have this standard error."""
    mean, size = _effective_size(values)
    return _beta_ends(mean * size, (1 - mean) * size, outward=1.0)


def jeffreys_at_effective_size(values: FloatArray) -> Ends:
    """Quantiles of the Beta posterior under Jeffreys' prior, at the same number of questions."""
    mean, size = _effective_size(values)
    return _beta_ends(mean * size, (1 - mean) * size, outward=0.5)


def wilson_at_effective_size(values: FloatArray) -> Ends:
    """Wilson's score interval at the same number of questions."""
    mean, size = _effective_size(values)
    quantile = stats.norm.ppf(1 - TAIL)
    return _wilson(mean, size, quantile)


def bayesian_bootstrap_with_ends(values: FloatArray) -> Ends:
    """Quantiles of randomly weighted means of the values and one end of the range, which weighs half a question."""
    n = values.shape[1]
    weights = np.random.default_rng(1).exponential(size=(NUM_RESAMPLES, n)).astype(np.float32)
    end = np.random.default_rng(2).gamma(0.5, size=NUM_RESAMPLES).astype(np.float32)
    totals = weights.sum(1) + end
    means = values.astype(np.float32) @ (weights / totals[:, None]).T
    return _quantiles(means)[0], _quantiles(means + end / totals)[1]


def ends_of_the_range(differences: FloatArray) -> Ends:
    """The chosen interval of a difference, with the invented values at -1 and 1 whatever was seen."""
    n = differences.shape[1] + 2
    mean = differences.sum(1) / n
    squares = ((differences - mean[:, None]) ** 2).sum(1) + (1 - mean) ** 2 + (1 + mean) ** 2
    reach = stats.t.ppf(1 - TAIL, n - 1) * np.sqrt(squares / (n - 1) / n)
    return np.maximum(mean - reach, -1), np.minimum(mean + reach, 1)


def normal_of_noise(mean: FloatArray, error: FloatArray, num_groups: float) -> Ends:
    """Mean and standard error of the sampling noise."""
    reach = stats.norm.ppf(1 - TAIL) * error
    return mean - reach, mean + reach


def clopper_pearson_of_noise(mean: FloatArray, error: FloatArray, num_groups: float) -> Ends:
    """Exact binomial interval at the number of independent groups of k samples that would have this error."""
    mean = np.minimum(mean, 1)  # a mean of ones may round to more
    spread = mean * (1 - mean)
    square = error**2  # which may vanish where the error does not
    size = np.where(square > 0, spread / np.where(square > 0, square, 1), num_groups)
    return _beta_ends(mean * size, (1 - mean) * size, outward=1.0)


SCORES = {
    "Student's t": students_t,
    "percentile bootstrap": percentile_bootstrap,
    "studentised bootstrap": studentised_bootstrap,
    "Clopper-Pearson, effective size": clopper_pearson_at_effective_size,
    "Jeffreys, effective size": jeffreys_at_effective_size,
    "Wilson, effective size": wilson_at_effective_size,
    "Bayesian bootstrap with ends": bayesian_bootstrap_with_ends,
}
DIFFERENCES = {
    "Student's t": students_t,
    "percentile bootstrap": percentile_bootstrap,
    "studentised bootstrap": studentised_bootstrap,
    "invented ends at −1 and 1": ends_of_the_range,
}
NOISE = {"normal": normal_of_noise, "Clopper-Pearson, effective size": clopper_pearson_of_noise}


def _mean_and_error(values: FloatArray) -> Ends:
    return values.mean(1), values.std(1, ddof=1) / np.sqrt(values.shape[1])


@functools.lru_cache(maxsize=1)
def _resamples(n: int) -> npt.NDArray[np.float32]:
    """How often each of n questions is drawn in each resample."""
    drawn = np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    return drawn.astype(np.float32)


def _quantiles(means: npt.NDArray[np.float32]) -> Ends:
    low, high = np.quantile(means, [TAIL, 1 - TAIL], axis=1)
    return low, high


def _effective_size(values: FloatArray) -> Ends:
    """Mean, and the number of yes-or-no questions with its standard error, less what n - 1 degrees of freedom cost.

    Source: Korn and Graubard, Survey Methodology 24, 1998.
    """
    mean, error = _mean_and_error(values)
    n = values.shape[1]
    shrink = (stats.norm.ppf(1 - TAIL) / stats.t.ppf(1 - TAIL, n - 1)) ** 2
    # rounding leaves equal values an error of some 1e-17
    spread = error > 1e-12
    size = np.where(spread, mean * (1 - mean) / np.where(spread, error, 1) ** 2, n)
    return mean, size * shrink


def _beta_ends(successes: FloatArray, failures: FloatArray, outward: float) -> Ends:
    inward = 1 - outward
    low = stats.beta.ppf(TAIL, successes + inward, failures + outward)
    high = stats.beta.ppf(1 - TAIL, successes + outward, failures + inward)
    # without a success or a failure, and where SciPy finds no quantile, the interval ends at the end of the range
    low = np.where((successes + inward > 1e-9) & ~np.isnan(low), low, 0.0)
    return low, np.where((failures + inward > 1e-9) & ~np.isnan(high), high, 1.0)


def _wilson(mean: FloatArray, size: FloatArray, quantile: float) -> Ends:
    weight = quantile**2 / size
    centre = (mean + weight / 2) / (1 + weight)
    reach = quantile / (1 + weight) * np.sqrt(mean * (1 - mean) / size + quantile**2 / (4 * size**2))
    return centre - reach, centre + reach
