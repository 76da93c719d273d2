"""Intervals against independent oracles, their coverage by simulation, and wording that follows from the interval."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlprior.config import RunError
from rlprior.statistics.comparisons import (
    NUM_RESAMPLES,
    Comparison,
    Measurement,
    _resample_counts,
    compare,
    difference,
    estimate,
    sentence,
    useful_decimals,
)


def documents(amounts: np.ndarray, weights: np.ndarray, paired: bool = False) -> Measurement:
    ids = tuple(str(i) for i in range(len(amounts)))
    return Measurement(ids, np.asarray(amounts, float), np.asarray(weights, float), "documents", None, paired)


def questions(points: np.ndarray) -> Measurement:
    ids = tuple(str(i) for i in range(len(points)))
    return Measurement(ids, np.asarray(points, float), np.ones(len(points)), "questions", (0.0, 100.0))


def scores(random: np.random.Generator, chance: np.ndarray, num_samples: int = 16) -> Measurement:
    return questions(100 * random.binomial(num_samples, chance) / num_samples)


def against(
    left: Measurement | list[Measurement], right: Measurement | list[Measurement], family: int = 1
) -> Comparison:
    lefts, rights = ([one] if isinstance(one, Measurement) else one for one in (left, right))
    return compare(
        [difference(a, b) for a, b in zip(lefts, rights, strict=True)],
        quantity="Score",
        subject="A",
        reference="B",
        unit="points",
        family_size=family,
    )


class TestPairing:
    def test_units_are_matched_by_name_whatever_their_order(self) -> None:
        left = Measurement(("a", "b", "c"), np.array([3.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0]), "documents")
        right = Measurement(
            ("c", "a", "z"), np.array([1.0, 2.0, 9.0]), np.array([3.0, 1.0, 4.0]), "documents"
        )
        paired = difference(left, right)
        assert paired.ids == ("a", "c")
        assert paired.amounts.tolist() == [1.0, 6.0]
        assert paired.value == 7 / 4

    def test_nothing_in_common_is_refused(self) -> None:
        one = documents(np.ones(2), np.ones(2))
        with pytest.raises(RunError, match="no documents in common"):
            difference(one, replace(one, ids=("x", "y")))

    def test_another_tokenizer_is_refused(self) -> None:
        with pytest.raises(RunError, match="different tokenizers"):
            difference(documents(np.ones(2), np.ones(2)), documents(np.ones(2), np.array([1.0, 2.0])))

    def test_no_run_is_refused(self) -> None:
        with pytest.raises(RunError, match="no finished run"):
            estimate([])


class TestIntervalsAgainstOracles:
    def test_paired_questions_give_students_t(self) -> None:
        random = np.random.default_rng(0)
        left, right = (scores(random, random.uniform(size=50)) for _ in range(2))
        expected = stats.ttest_rel(left.amounts, right.amounts).confidence_interval(0.9)
        found = estimate([difference(left, right)], level=0.9)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
        assert (found.n, found.unit_of_chance) == (50, "questions")

    def test_several_seeds_give_students_t_over_their_values(self) -> None:
        random = np.random.default_rng(1)
        runs = [scores(random, random.uniform(size=40)) for _ in range(5)]
        expected = stats.ttest_1samp([run.value for run in runs], 0).confidence_interval(0.95)
        found = estimate(runs)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
        assert (found.n, found.unit_of_chance) == (5, "seeds")

    def test_documents_of_one_length_give_students_t(self) -> None:
        amounts = np.random.default_rng(9).normal(2, 0.3, size=25)
        expected = stats.ttest_1samp(amounts, 0).confidence_interval(0.95)
        found = estimate([documents(7 * amounts, np.full(25, 7.0))])
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)

    def test_documents_of_many_lengths_give_the_linearised_ratio(self) -> None:
        """Error of a ratio by the delta method, at the number of documents of one length that would average as well."""
        random = np.random.default_rng(10)
        weights = random.integers(5, 200, size=13).astype(float)
        amounts = weights * random.normal(2, 0.3, size=13)
        value = sum(amounts) / sum(weights)
        squares = sum((a - value * w) ** 2 for a, w in zip(amounts, weights, strict=True))
        error = math.sqrt(13 / 12 * squares) / sum(weights)
        size = sum(weights) ** 2 / sum(w**2 for w in weights)
        found = estimate([documents(amounts, weights)], level=0.9)
        expected = (value - stats.t.ppf(0.95, size - 1) * error, value + stats.t.ppf(0.95, size - 1) * error)
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)

    def test_one_long_document_beside_short_ones_leaves_a_finite_interval(self) -> None:
        found = estimate([documents(np.array([2000.0, 30.0]), np.array([1000.0, 10.0]))])
        # The effective size is 1.02: one degree of freedom is the least that Student's t has.
        assert math.isfinite(found.low)
        assert "count as 1) are few" in found.warning

    @pytest.mark.parametrize("level", [0.95, 0.9875])
    def test_scores_give_the_studentised_bootstrap(self, level: float) -> None:
        """The same resamples, one at a time and from the definition."""
        points = np.random.default_rng(2).uniform(20, 90, size=13)
        pivots = []
        for counts in _resample_counts(13).astype(int):
            drawn = np.repeat(points, counts)
            pivots.append((drawn.mean() - points.mean()) / (drawn.std(ddof=1) / math.sqrt(13)))
        ordered = sorted(pivots)
        # inverted_cdf: the smallest value at which the empirical distribution reaches the quantile
        lowest, highest = (
            ordered[math.ceil(q * NUM_RESAMPLES) - 1] for q in ((1 - level) / 2, (1 + level) / 2)
        )
        scale = points.std(ddof=1) / math.sqrt(13)
        found = estimate([questions(points)], level=level)
        expected = (points.mean() - highest * scale, points.mean() - lowest * scale)
        # A variance as a difference of squares loses up to six of sixteen digits.
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)

    def test_rare_successes_fall_back_to_an_exact_interval(self) -> None:
        points = np.zeros(80)
        points[:2] = 100
        found = estimate([questions(points)])
        exact = stats.binomtest(2, 80).proportion_ci(0.95, method="exact")
        assert found.method == "Clopper-Pearson at the effective sample size"
        # The effective size is below 80 by the ratio of t to normal quantiles and by (n - 1)/n: a little wider, never narrower.
        assert 0.9 * 100 * exact.low < found.low <= 100 * exact.low
        assert 100 * exact.high <= found.high < 1.1 * 100 * exact.high

    @pytest.mark.parametrize("value", [0.0, 100.0])
    def test_equal_scores_do_not_claim_certainty(self, value: float) -> None:
        """The width is the largest share of other questions that n draws miss with probability 5%."""
        found = estimate([questions(np.full(40, value))])
        unseen = abs(found.high - found.low) / 100
        assert (1 - unseen) ** 40 == pytest.approx(0.05, rel=1e-9)
        assert value in (found.low, found.high)

    def test_equal_differences_are_no_evidence_either_way(self) -> None:
        one = questions(np.full(40, 25.0))
        found = against(one, one)
        assert found.effect == 0
        assert found.low < 0 < found.high
        assert not found.decided

    def test_identical_models_are_not_told_apart(self) -> None:
        one = documents(np.arange(1.0, 41), np.ones(40))
        assert not against(one, one).decided
        assert not against([one, one], [one, one]).decided

    def test_seeds_that_agree_exactly_leave_no_spread_to_judge_by(self) -> None:
        high, low = questions(np.array([50.0, 60.0])), questions(np.array([40.0, 60.0]))
        found = against([high, high], [low, low])
        assert found.effect == 5
        assert not found.decided
        assert "agree exactly" in found.warning

    def test_seeds_that_all_score_zero_are_no_more_certain_than_one_of_them(self) -> None:
        none = questions(np.zeros(20))
        one, two = estimate([none]), estimate([none, none])
        assert (two.low, two.high) == (one.low, one.high)
        assert two.high > 5
        assert "agree exactly" in two.warning

    def test_scores_stay_in_range(self) -> None:
        found = estimate([questions(np.array([100.0] * 20 + [90.0])), questions(np.array([100.0] * 21))])
        assert found.high == 100.0

    def test_results_repeat(self) -> None:
        one = questions(np.linspace(20, 80, 30))
        first = estimate([one])
        _resample_counts.cache_clear()
        np.random.default_rng().normal()
        assert estimate([one]) == first


# The design allows nominal 95% intervals to cover at least 93% on these distributions; four standard errors of a
# simulated share are allowed on top, which a correct method exceeds once in 30 000 runs.
def four_errors(rate: float, trials: int) -> float:
    return 4 * math.sqrt(rate * (1 - rate) / trials)


class TestCoverage:
    TRIALS = 400

    @pytest.mark.parametrize(
        ("shape", "num_questions"), [((1, 1), 30), ((0.3, 3), 60), ((3, 0.3), 60), ((0.1, 0.1), 60)]
    )
    def test_of_one_score(self, shape: tuple[float, float], num_questions: int) -> None:
        random = np.random.default_rng(3)
        truth = 100 * shape[0] / sum(shape)
        covered = 0
        for _ in range(self.TRIALS):
            found = estimate([scores(random, random.beta(*shape, size=num_questions))])
            covered += found.low <= truth <= found.high
        assert covered / self.TRIALS >= 0.93 - four_errors(0.93, self.TRIALS)

    def test_of_a_difference_in_nats(self) -> None:
        random = np.random.default_rng(4)
        covered = 0
        for _ in range(self.TRIALS):
            weights = np.maximum(1, np.round(200 * random.lognormal(0, 0.7, 100)))
            left = documents(weights * random.normal(2.03, 0.1, 100), weights)
            found = against(left, documents(weights * random.normal(2.0, 0.1, 100), weights))
            covered += found.low <= 0.03 <= found.high
        assert covered / self.TRIALS >= 0.93 - four_errors(0.93, self.TRIALS)


class TestFalsePositives:
    TRIALS = 400

    def test_over_documents_and_questions(self) -> None:
        random = np.random.default_rng(5)
        false = {"documents": 0, "questions": 0}
        for _ in range(self.TRIALS):
            weights = np.maximum(1, np.round(200 * random.lognormal(0, 0.7, 100)))
            left, right = (documents(weights * random.normal(2, 0.1, 100), weights) for _ in range(2))
            false["documents"] += against(left, right).decided
            chance = random.uniform(size=100)
            false["questions"] += against(scores(random, chance), scores(random, chance)).decided
        bound = 0.07 + four_errors(0.07, self.TRIALS)
        assert false["documents"] / self.TRIALS <= bound
        assert false["questions"] / self.TRIALS <= bound
        # A test that decides nothing would pass the bound: 400 chances at 5% all miss once in a billion runs.
        assert false["questions"] > 0

    @pytest.mark.parametrize("num_seeds", [2, 5])
    def test_over_seeds(self, num_seeds: int) -> None:
        """Student's t is exact for normal values, so the rate is 5%, not 7%."""
        random = np.random.default_rng(6)
        false = 0
        for _ in range(self.TRIALS):
            left, right = (
                [documents(np.array([v, v]), np.ones(2)) for v in random.normal(2, 0.1, num_seeds)]
                for _ in range(2)
            )
            false += against(left, right).decided
        assert 0 < false / self.TRIALS <= 0.05 + four_errors(0.05, self.TRIALS)

    def test_of_a_family(self) -> None:
        """Four arms that equal the baseline: uncorrected, some arm would be decided in about 15% of studies."""
        random = np.random.default_rng(7)
        alone = corrected = 0
        for _ in range(self.TRIALS):
            chance = random.uniform(size=100)
            baseline = scores(random, chance)
            family = [against(scores(random, chance), baseline, family=4) for _ in range(4)]
            alone += any(one.decided for one in family)
            corrected += any(one.decided_in_family for one in family)
        assert corrected / self.TRIALS <= 0.07 + four_errors(0.07, self.TRIALS)
        assert alone > corrected


@pytest.mark.parametrize("direction", [1, -1])
def test_real_effects_are_found(direction: int) -> None:
    """Effects of eight standard errors or more: missed less than once in 10^6 even after correction."""
    random = np.random.default_rng(8)
    weights = np.full(200, 100.0)
    left = documents(weights * (2 + direction * 0.1 + random.normal(0, 0.1, 200)), weights)
    found = against(left, documents(weights * (2 + random.normal(0, 0.1, 200)), weights), family=4)
    assert found.decided_in_family
    assert math.copysign(1, found.effect) == direction
    chance = random.uniform(0.2, 0.8, size=200)
    found = against(scores(random, chance + direction * 0.15), scores(random, chance), family=4)
    assert found.decided_in_family
    assert math.copysign(1, found.effect) == direction


def test_a_comparison_over_seeds_says_in_how_many_it_points_the_same_way() -> None:
    left = [documents(np.array([2 + shift]), np.ones(1)) for shift in (0.2, 0.1, -0.1)]
    found = against(left, [documents(np.array([2.0]), np.ones(1))] * 3)
    assert found.seed_effects == pytest.approx((0.2, 0.1, -0.1))
    assert "over 3 seeds, higher in 2)" in sentence(found)


class TestWarnings:
    def test_few_units(self) -> None:
        assert "29 questions are few" in estimate([questions(np.linspace(20, 80, 29))]).warning
        assert estimate([questions(np.linspace(20, 80, 30))]).warning == ""

    def test_uneven_documents_count_as_fewer(self) -> None:
        weights = np.ones(100)
        weights[0] = 100
        found = estimate([documents(weights * np.linspace(1, 2, 100), weights)])
        # (199)^2 / (100^2 + 99) = 3.9
        assert "100 documents (their lengths differ so much that they count as 4) are few" in found.warning

    @pytest.mark.parametrize(("mean", "warned"), [(2, True), (98, True), (10, False)])
    def test_scores_near_an_end(self, mean: float, warned: bool) -> None:
        found = estimate([questions(mean + np.linspace(-1, 1, 50))])
        assert ("close to an end" in found.warning) == warned

    def test_differences_on_few_questions(self) -> None:
        before = np.linspace(20, 80, 100)
        after = before.copy()
        after[:3] += 10
        assert "few questions changed" in against(questions(after), questions(before)).warning


def comparison(
    effect: float, low: float, high: float, *, family: int = 1, in_family: bool = True
) -> Comparison:
    decided = low > 0 or high < 0
    return Comparison(
        quantity="Entropy",
        subject="A",
        reference="B",
        unit="nats per token",
        effect=effect,
        low=low,
        high=high,
        level=0.95,
        n=212,
        unit_of_chance="documents",
        decided=decided,
        family_size=family,
        decided_in_family=decided and in_family,
        method="t",
    )


class TestSentence:
    def test_lower(self) -> None:
        assert sentence(comparison(-0.03, -0.04, -0.02)) == (
            "Entropy: A is lower than B by 0.030 nats per token (95% interval 0.020 to 0.040 over 212 documents): larger than "
            "chance."
        )

    def test_higher_in_a_family(self) -> None:
        one = comparison(0.03, 0.02, 0.04, family=4)
        assert "is higher than B by 0.030" in sentence(one)
        assert sentence(one).endswith("larger than chance, also after correction for 4 comparisons.")
        alone = comparison(0.03, 0.02, 0.04, family=4, in_family=False)
        assert sentence(alone).endswith(
            "larger than chance taken alone, but not after correction for 4 comparisons."
        )

    def test_undecided(self) -> None:
        assert sentence(comparison(-0.01, -0.04, 0.02)) == (
            "Entropy: A and B cannot be told apart (difference −0.010 nats per token, 95% interval −0.040 to +0.020 over 212 "
            "documents)."
        )

    @given(
        st.floats(-50, 50, allow_nan=False),
        st.floats(1e-6, 20, allow_nan=False),
        st.floats(1e-6, 20, allow_nan=False),
    )
    def test_wording_follows_the_interval(self, effect: float, below: float, above: float) -> None:
        one = comparison(effect, effect - below, effect + above)
        text = sentence(one)
        assert ("higher than" in text) == (one.low > 0)
        assert ("lower than" in text) == (one.high < 0)
        assert ("cannot be told apart" in text) == (one.low <= 0 <= one.high)
        assert ("larger than chance" in text) != ("cannot be told apart" in text)

    @given(st.floats(1e-5, 100))
    def test_decimals_show_one_or_two_digits_of_the_width(self, half_width: float) -> None:
        shown = half_width * 10 ** useful_decimals(-half_width, half_width)
        # At least one decimal is always shown, so a width above 4 shows more digits.
        assert half_width >= 4 or 3.99 <= shown <= 40.01
