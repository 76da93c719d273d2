"""Intervals against their definitions, their coverage, and the words that go with them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from bench.intervals import run
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlprior.statistics.estimators import pass_at_k, pass_at_k_variance
from rlprior.statistics.intervals import (
    LIKE_THESE,
    MIN_QUESTIONS_OF_DIFFERENCE,
    MIN_QUESTIONS_OF_SCORE,
    MIN_SPREADING,
    THESE,
    difference_interval,
    doubt,
    holm,
    sampling_difference,
    sampling_interval,
    score_interval,
    spreading_questions,
)

scores = st.lists(st.floats(0, 1), min_size=1, max_size=60)
changes = st.lists(st.floats(-1, 1), min_size=1, max_size=60)
levels = st.sampled_from([0.9, 0.95, 0.99])


@given(scores, levels)
def test_a_score_has_students_t_over_its_values_and_both_ends(values: list[float], level: float) -> None:
    expected = stats.ttest_1samp([*values, 0, 1], 0).confidence_interval(level)
    found = score_interval(values, level=level)
    # sums of 62 numbers of at most 1 in another order
    assert found.low == pytest.approx(max(0, expected.low), abs=1e-13)
    assert found.high == pytest.approx(min(1, expected.high), abs=1e-13)
    assert found.value == pytest.approx(sum(values) / len(values), abs=1e-15 * len(values))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (found.num_questions, found.covers) == (len(values), LIKE_THESE)


@given(changes, levels)
def test_a_difference_has_students_t_over_its_values_and_the_largest_both_ways(
    values: list[float], level: float
) -> None:
    # squares of smaller differences are lost beside rounding in the expected test
    values = [value if abs(value) > 1e-6 else 0.0 for value in values]
    largest = max(map(abs, values)) or 1.0
    test = stats.ttest_1samp([*values, largest, -largest], 0)
    expected = test.confidence_interval(level)
    found = difference_interval(values, level=level)
    assert found.low == pytest.approx(max(-1, expected.low), abs=1e-12)
    assert found.high == pytest.approx(min(1, expected.high), abs=1e-12)
    assert found.p_value == pytest.approx(test.pvalue, rel=1e-6)
    assert (found.p_value < 1 - level) == (found.low > 0 or found.high < 0)


@given(changes)
def test_swapping_the_models_turns_the_difference_around(values: list[float]) -> None:
    one, other = difference_interval(values), difference_interval([-value for value in values])
    # the same roundings with the other sign, up to the order in which ends cancel
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=1e-14)
    assert other.p_value == pytest.approx(one.p_value, rel=1e-9)


def test_equal_models_are_not_told_apart_and_not_called_equal() -> None:
    found = difference_interval(np.zeros(100))
    assert found.low == -found.high < 0
    assert found.p_value == 1
    # within the share of questions that 100 draws miss with probability 5%, 3%
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 100), rel=0.1)


def test_rounding_is_no_difference() -> None:
    found = difference_interval(np.full(100, 1e-16))
    assert found.low < -0.02 < 0.02 < found.high


def test_noise_has_the_variance_of_its_questions_and_of_two_invented_groups() -> None:
    correct = np.array([0, 3, 8, 16])
    found = sampling_interval(16, correct, 4, level=0.9)
    values, variances = pass_at_k(16, correct, 4), pass_at_k_variance(16, correct, 4)
    groups = 16 / 4  # of each question: 16 in all, and two more
    mean = (groups * values.sum() + 1) / 18
    error = math.sqrt(groups**2 * variances.sum() + mean**2 + (1 - mean) ** 2) / 18
    ends = mean - 1.6448536 * error, mean + 1.6448536 * error
    assert (found.low, found.high) == pytest.approx(ends, rel=1e-7)
    assert (found.value, found.covers) == (values.mean(), THESE)


@pytest.mark.parametrize("correct", [0, 16])
def test_samples_that_all_agree_leave_room_for_others(correct: int) -> None:
    found = sampling_interval(16, np.full(50, correct))
    width = found.high - found.low
    # 800 draws miss a share of 0.4% with probability 5%
    assert width == pytest.approx(1 - 0.05 ** (1 / 800), rel=0.1)
    assert found.value in (found.low, found.high)


def test_differences_on_the_same_questions_add_the_noise_of_both() -> None:
    first, second = sampling_interval(16, np.array([2, 8])), sampling_interval(16, np.array([10, 12]))
    found = sampling_difference(first, second)
    assert found.value == pytest.approx(6 / 16)
    assert found.value - found.low == pytest.approx(
        math.hypot(second.value - second.low, first.high - first.value)
    )
    assert found.high - found.value == pytest.approx(
        math.hypot(second.high - second.value, first.value - first.low)
    )
    assert found.covers == THESE


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: score_interval([]), "one value for each question"),
        (lambda: score_interval([[0.5]]), "one value for each question"),
        (lambda: score_interval([0.5, 1.1]), "between 0 and 1"),
        (lambda: score_interval([0.5, math.nan]), "between 0 and 1"),
        (lambda: difference_interval([-1.1]), "between -1 and 1"),
        (lambda: score_interval([0.5], level=1), "level = 1"),
        (lambda: sampling_interval(8, np.array([1]), level=0), "level = 0"),
        (lambda: sampling_interval(8, np.array([], dtype=int)), "no questions"),
        (lambda: sampling_interval(8, np.array([1]), 5), "2k = 10"),
    ],
)
def test_senseless_values_are_refused(act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


class TestCoverage:
    """Spot checks of what bench/intervals measures over all its distributions: 93% at least, and four standard errors of a share."""

    TRIALS = 400
    LEAST = 0.93 - 4 * math.sqrt(0.93 * 0.07 / TRIALS)

    @pytest.mark.parametrize("num_questions", [30, 500])
    def test_of_a_score_at_any_proportion(self, num_questions: int) -> None:
        """0 and 1 values: coverage is a sum over the binomial distribution, exact, so that nothing is allowed on top."""
        found = [score_interval(np.arange(num_questions) < correct) for correct in range(num_questions + 1)]
        lows, highs = np.array([one.low for one in found]), np.array([one.high for one in found])
        for chance in np.linspace(0.001, 0.999, 333):
            share = stats.binom.pmf(np.arange(num_questions + 1), num_questions, chance)
            assert share[(lows <= chance) & (chance <= highs)].sum() >= 0.93

    @pytest.mark.parametrize("k", [1, 8])
    def test_of_one_model_on_hard_questions(self, k: int) -> None:
        random = np.random.default_rng(0)
        # E[(1 - p)^k] of Beta(0.3, 9.7)
        truth = 1 - math.exp(math.lgamma(9.7 + k) - math.lgamma(10 + k) - math.lgamma(9.7) + math.lgamma(10))
        covered = noise_covered = 0
        for _ in range(self.TRIALS):
            chances = random.beta(0.3, 9.7, size=100)
            correct = random.binomial(16, chances)
            found, noise = score_interval(pass_at_k(16, correct, k)), sampling_interval(16, correct, k)
            covered += found.low <= truth <= found.high
            noise_covered += noise.low <= (1 - (1 - chances) ** k).mean() <= noise.high
        assert covered / self.TRIALS >= self.LEAST
        assert noise_covered / self.TRIALS >= self.LEAST

    def test_of_two_models(self) -> None:
        """Over questions like these, and on these very questions; the truth of the first is the mean of p + 0.1 (1 - p) - p."""
        random = np.random.default_rng(1)
        covered = noise_covered = 0
        for _ in range(self.TRIALS):
            chances = random.uniform(size=100)
            better = chances + 0.1 * (1 - chances)
            first, second = random.binomial(16, chances), random.binomial(16, better)
            found = difference_interval((second - first) / 16)
            noise = sampling_difference(sampling_interval(16, first), sampling_interval(16, second))
            covered += found.low <= 0.05 <= found.high
            noise_covered += noise.low <= (better - chances).mean() <= noise.high
        assert covered / self.TRIALS >= self.LEAST
        assert noise_covered / self.TRIALS >= self.LEAST
        # one that always covers would say nothing
        assert covered < self.TRIALS
        assert noise_covered < self.TRIALS


class TestDoubt:
    def test_few_questions(self) -> None:
        n = MIN_QUESTIONS_OF_DIFFERENCE
        assert difference_interval(np.full(n - 1, 0.5)).warning == (
            f"{n - 1} questions are few: the interval may be too narrow"
        )
        assert difference_interval(np.full(n, 0.5)).warning == ""
        assert score_interval(np.full(MIN_QUESTIONS_OF_SCORE - 1, 0.5)).warning == "29 questions are few"
        assert score_interval(np.zeros(MIN_QUESTIONS_OF_SCORE)).warning == ""

    def test_a_difference_that_few_questions_spread(self) -> None:
        values = np.where(np.arange(500) < MIN_SPREADING - 1, 0.5, 0)
        assert doubt(values).startswith(f"the spread comes from about {MIN_SPREADING - 1} of 500 questions")
        assert doubt(np.where(np.arange(500) < MIN_SPREADING, -0.5, 0)) == ""
        assert doubt(np.zeros(500)) == ""

    @given(changes)
    def test_no_more_questions_spread_than_change(self, values: list[float]) -> None:
        found = spreading_questions(np.array(values))
        num_changed = sum(value != 0 for value in values)
        # a sum of 60 positive numbers, one of which is the largest; changes below rounding count for nothing
        assert found == 0 or 1 - 1e-12 <= found <= num_changed * (1 + 1e-12)


@given(st.lists(st.floats(0, 1), max_size=5))
def test_holm_is_the_largest_over_all_families_that_hold_the_comparison(p_values: list[float]) -> None:
    """The closed test from which it follows: a comparison stands where every family with it does, at Bonferroni's threshold."""
    expected = [
        max(
            min(1.0, len(family) * min(p_values[i] for i in family))
            for size in range(1, len(p_values) + 1)
            for family in itertools.combinations(range(len(p_values)), size)
            if index in family
        )
        for index in range(len(p_values))
    ]
    assert holm(p_values) == expected


class TestSimulation:
    """The committed simulation is of this code, and says what the documentation says of it."""

    CELLS: ClassVar = json.loads((Path(__file__).parents[2] / "results" / "intervals.json").read_text())[
        "cells"
    ]

    def test_intervals_cover_at_500_questions(self) -> None:
        large = [cell for cell in self.CELLS if cell["num_questions"] == 500]
        assert {cell["of"] for cell in large} == {"score", "difference", "noise"}
        assert min(cell["coverage_and_width"][run.CHOSEN][0] for cell in large) >= 0.93

    def test_scores_cover_at_any_number_of_questions(self) -> None:
        scores = [cell for cell in self.CELLS if cell["of"] == "score"]
        assert min(cell["num_questions"] for cell in scores) == MIN_QUESTIONS_OF_SCORE
        assert min(cell["coverage_and_width"][run.CHOSEN][0] for cell in scores) >= 0.93

    def test_differences_that_fall_short_are_warned_of(self) -> None:
        short = [
            cell
            for cell in self.CELLS
            if cell["of"] == "difference" and cell["coverage_and_width"][run.CHOSEN][0] < 0.93
        ]
        assert short
        assert min(cell["warned"] for cell in short) > 0.5

    @pytest.mark.parametrize(
        ("of", "simulate"),
        [
            ("score", run.simulate_scores),
            ("difference", run.simulate_differences),
            ("noise", run.simulate_noise),
        ],
    )
    def test_the_file_is_what_the_code_gives(self, of: str, simulate: Any) -> None:
        found, written = next(simulate(400)), next(cell for cell in self.CELLS if cell["of"] == of)
        for name in ("difficulty", "estimand", "num_questions", "truth"):
            assert found[name] == pytest.approx(written[name], abs=0.05)
        coverage, width = found["coverage_and_width"][run.CHOSEN]
        before, width_before = written["coverage_and_width"][run.CHOSEN]
        # five standard errors of a coverage of 95% over 400 trials; widths of cells with spread vary by some percent over trials
        assert coverage == pytest.approx(before, abs=5 * math.sqrt(0.05 * 0.95 / 400))
        assert width == pytest.approx(width_before, rel=0.05)
