"""Estimators against enumeration of every draw."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprior.statistics.estimators import (
    Consensus,
    avg_at_m,
    cons_at_k,
    cons_at_m,
    pass_at_k,
    pass_at_k_variance,
    pass_curve,
    signal_at_g,
)

SMALL = [(n, c, k) for n in range(1, 9) for c in range(n + 1) for k in range(1, n + 1)]


def share_of_draws(n: int, c: int, k: int, accept) -> float:
    """Share of the k-subsets of n samples, the first c correct, whose set of grades `accept` accepts."""
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    # Fraction -> float rounds once, as the estimators claim to: equality below is exact.
    return float(Fraction(sum(accept(set(draw)) for draw in draws), len(draws)))


@pytest.mark.parametrize(("n", "c", "k"), SMALL)
def test_pass_at_k_counts_the_draws(n: int, c: int, k: int) -> None:
    assert pass_at_k(n, c, k) == share_of_draws(n, c, k, lambda grades: True in grades)


@pytest.mark.parametrize(("n", "c", "g"), SMALL)
def test_signal_at_g_counts_the_draws(n: int, c: int, g: int) -> None:
    assert signal_at_g(n, c, g) == share_of_draws(n, c, g, lambda grades: len(grades) == 2)


@pytest.mark.parametrize(("n", "c", "k"), SMALL)
def test_avg_is_pass_at_1(n: int, c: int, k: int) -> None:
    assert avg_at_m(n, c) == pass_at_k(n, c, 1) == c / n


@pytest.mark.parametrize("n", [1, 2, 6, 128, 1024])
def test_a_curve_is_pass_at_every_k(n: int) -> None:
    correct = np.unique([0, n // 100, n // 3, n // 2, n - 1, n])
    exact = np.stack([pass_at_k(n, correct, k) for k in range(1, n + 1)], axis=-1)
    curve = pass_curve(n, correct)
    assert curve.shape == (len(correct), n)
    # A product of n rounded ratios is off by at most n roundings (and n more of its own), relative to a number below 1.
    assert np.abs(curve - exact).max() <= 2 * n * np.finfo(float).eps
    assert pass_curve(n, correct.reshape(-1, 1)).shape == (len(correct), 1, n)


@pytest.mark.parametrize(
    "chance", [Fraction(0), Fraction(1, 10), Fraction(1, 2), Fraction(2, 3), Fraction(1)]
)
@pytest.mark.parametrize(("n", "k"), [(n, k) for n in range(2, 8) for k in range(1, n // 2 + 1)])
def test_the_variance_of_pass_at_k_is_unbiased(n: int, k: int, chance: Fraction) -> None:
    """Its mean over all counts of a problem with that chance is the variance of the estimate over them."""
    likely = [math.comb(n, c) * chance**c * (1 - chance) ** (n - c) for c in range(n + 1)]
    values = [1 - Fraction(math.comb(n - c, k), math.comb(n, k)) for c in range(n + 1)]
    mean = sum(share * value for share, value in zip(likely, values, strict=True))
    variance = sum(share * (value - mean) ** 2 for share, value in zip(likely, values, strict=True))
    found = pass_at_k_variance(n, np.arange(n + 1), k)
    # n + 1 rounded numbers of at most 1/4, summed with shares that add up to 1
    assert sum(float(share) * one for share, one in zip(likely, found, strict=True)) == pytest.approx(
        float(variance), abs=1e-15
    )
    assert (found >= 0).all()


def test_the_variance_of_one_sample_is_the_binomial_one() -> None:
    # three roundings on one side, one on the other
    assert pass_at_k_variance(128, np.arange(129), 1) == pytest.approx(
        np.arange(129) / 128 * (1 - np.arange(129) / 128) / 127, rel=1e-15
    )


def test_too_few_samples_for_a_variance_are_refused() -> None:
    with pytest.raises(ValueError, match="2k = 10 must be between 1 and the 8 samples"):
        pass_at_k_variance(8, 3, 5)
    with pytest.raises(ValueError, match="c must be"):
        pass_curve(8, np.array([9]))


def test_arrays_give_the_numbers_elementwise() -> None:
    n = np.array([[4], [8]])
    c = np.array([0, 2, 4])
    expected = [[pass_at_k(4, i, 3) for i in (0, 2, 4)], [pass_at_k(8, i, 3) for i in (0, 2, 4)]]
    result = pass_at_k(n, c, 3)
    assert result.dtype == np.float64
    assert result.tolist() == expected
    assert signal_at_g(8, c, 2).tolist() == [signal_at_g(8, i, 2) for i in (0, 2, 4)]
    assert avg_at_m(8, c).tolist() == [0.0, 0.25, 0.5]


def test_no_problems_give_no_estimates() -> None:
    assert pass_at_k(8, np.array([], dtype=np.int64), 3).shape == (0,)


def test_large_pools_stay_exact() -> None:
    # 1 - C(1023, 512)/C(1024, 512) is one half; both binomials exceed the float64 range.
    assert pass_at_k(1024, 1, 512) == 0.5
    assert pass_at_k(np.int64(1024).item(), np.array([1]), 512).tolist() == [0.5]


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_rises_with_k_and_signal_is_symmetric(pool: tuple[int, int]) -> None:
    n, c = pool
    curve = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert curve == sorted(curve)
    assert curve[-1] == float(c > 0)
    assert signal_at_g(n, c, 1) == 0
    assert [signal_at_g(n, c, g) for g in range(1, n + 1)] == [
        signal_at_g(n, n - c, g) for g in range(1, n + 1)
    ]


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 5, 1, "c must be"),
        (4, -1, 1, "c must be"),
        (4, 2, 0, "k = 0"),
        (4, 2, 5, "k = 5"),
        (4, 1.0, 1, "whole numbers"),
        (4, np.array([0.5]), 1, "whole numbers"),
        (np.array([8, 4]), np.array([1, 1]), 5, "the 4 samples"),
    ],
)
def test_senseless_counts_are_refused(n, c, k, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


ANSWERS = ("right", "right too", "wrong", "also wrong", None)


@pytest.mark.parametrize("m", range(1, 6))
def test_consensus_is_the_expectation_over_tie_breaks(m: int) -> None:
    """Every sequence of answers: break ties by each order of preference and average."""
    orders = list(itertools.permutations([answer for answer in ANSWERS if answer]))
    for answers in itertools.product(ANSWERS, repeat=m):
        grades = [answer is not None and answer.startswith("right") for answer in answers]
        votes = [answer for answer in answers if answer]
        outcomes = [
            max(votes, key=lambda a: (votes.count(a), -order.index(a))).startswith("right")
            if votes
            else False
            for order in orders
        ]
        result = cons_at_m(answers, grades)
        # Sums of at most 24 ones over 24: the two quotients may round apart by one unit in the last place.
        assert result.score == pytest.approx(sum(outcomes) / len(outcomes), abs=1e-15)
        counts = sorted((votes.count(answer) for answer in set(votes)), reverse=True)
        assert result.tied == (len(counts) > 1 and counts[0] == counts[1])


def test_consensus_without_a_vote_is_wrong() -> None:
    assert cons_at_m([None, None], [False, False]) == Consensus(score=0.0, tied=False)


@pytest.mark.parametrize(
    ("answers", "grades", "message"),
    [([], [], "one grade"), (["1"], [], "one grade"), (["1", "1"], [True, False], "both correct and wrong")],
)
def test_senseless_votes_are_refused(answers, grades, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cons_at_m(answers, grades)


VOTES = ("right", "right too", "right again", "wrong", "also wrong", None)


@pytest.mark.parametrize("m", range(1, 7))
def test_votes_of_k_are_the_mean_over_every_draw(m: int) -> None:
    """Every multiset of answers, every k, every draw."""
    for answers in itertools.combinations_with_replacement(VOTES, m):
        grades = [answer is not None and answer.startswith("right") for answer in answers]
        for k in range(1, m + 1):
            draws = list(itertools.combinations(range(m), k))
            mean = sum(
                cons_at_m([answers[i] for i in draw], [grades[i] for i in draw]).score for draw in draws
            ) / len(draws)
            # at most 20 draws and 6 factors: some tens of roundings of numbers below 1
            assert cons_at_k(answers, grades, k) == pytest.approx(mean, abs=1e-14)


@given(
    st.lists(st.sampled_from([*(str(number) for number in range(6)), None]), min_size=1, max_size=40),
    st.data(),
)
def test_votes_of_one_and_of_all_are_known(answers: list[str | None], data: st.DataObject) -> None:
    right = data.draw(st.sets(st.sampled_from("012345")))
    grades = [answer in right for answer in answers]
    m = len(answers)
    # 40 samples: products of at most 6 factors, sums of at most 40 x 41 positive terms
    assert cons_at_k(answers, grades, 1) == pytest.approx(avg_at_m(m, sum(grades)), abs=1e-13)
    assert cons_at_k(answers, grades, m) == pytest.approx(cons_at_m(answers, grades).score, abs=1e-13)
    order = data.draw(st.permutations(range(m)))
    k = data.draw(st.integers(1, m))
    assert cons_at_k([answers[i] for i in order], [grades[i] for i in order], k) == pytest.approx(
        cons_at_k(answers, grades, k), abs=1e-13
    )


def test_votes_of_large_pools_neither_overflow_nor_vanish() -> None:
    # all answers differ: whoever is drawn ties with all others, so that the score is the share of correct ones
    answers = [str(number) for number in range(1024)]
    # a thousand factors round a thousand times
    assert cons_at_k(answers, [number < 256 for number in range(1024)], 32) == pytest.approx(0.25, rel=1e-11)
    # two answers, 2 to 1, k odd: no ties, so the hypergeometric chance of drawing more of the first
    exact = sum(math.comb(400, i) * math.comb(200, 301 - i) for i in range(151, 302)) / math.comb(600, 301)
    assert cons_at_k(["a"] * 400 + ["b"] * 200, [True] * 400 + [False] * 200, 301) == pytest.approx(
        exact, rel=1e-11
    )


@pytest.mark.parametrize("k", [0, 3])
def test_votes_of_samples_that_do_not_exist_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 2 samples"):
        cons_at_k(["1", "2"], [True, False], k)
