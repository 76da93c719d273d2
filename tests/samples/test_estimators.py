"""Estimators against enumeration of every draw."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprior.samples.estimators import Consensus, avg_at_m, cons_at_m, pass_at_k, signal_at_g

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
