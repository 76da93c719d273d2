"""Unbiased estimates from n samples of a problem, c of them correct.

Every ratio of binomials is taken between exact integers and rounded once, so nothing overflows or cancels at any n; curves and votes are
sums of positive floats, good to 1e-12.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float64]


@overload
def pass_at_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_at_k(n: int | IntArray, c: IntArray, k: int) -> FloatArray: ...
def pass_at_k(n: int | IntArray, c: int | IntArray, k: int) -> float | FloatArray:
    """Chance that at least one of k samples, drawn without replacement from n of which c are correct, is correct.

    Pass@k = 1 - C(n - c, k) / C(n, k)

    Args:
        n: samples per problem; one number, or integers that broadcast with `c`.
        c: correct ones among them, 0 <= c <= n; one number, or integers of any shape (one per problem).
        k: samples drawn, 1 <= k <= n.

    Returns:
        A float for numbers, else float64 of the broadcast shape; the mean over problems estimates the benchmark's Pass@k.

    Raises:
        ValueError: a count outside its range, or not a whole number.

    Source: arXiv:2512.22955, Eq. 14.

    >>> pass_at_k(4, 1, 2)
    0.5
    >>> pass_at_k(4, np.array([0, 1, 3]), 2)
    array([0. , 0.5, 1. ])
    """
    return _estimate(_pass_ratio, n, c, k, "k")


def pass_curve(n: int, c: IntArray) -> FloatArray:
    """Pass@k for every k from 1 to n at once, by products of floats: good to n units in the last place, and cheap for many problems.

    1 - Pass@k = prod_{i<k} (n - c - i) / (n - i)

    Args:
        n: samples per problem.
        c: correct ones of each problem, [...], 0 <= c <= n.

    Returns:
        float64 [..., n]; column k - 1 is Pass@k.

    Raises:
        ValueError: a count outside its range, or not a whole number.

    >>> pass_curve(4, np.array([0, 1, 3]))
    array([[0.  , 0.  , 0.  , 0.  ],
           [0.25, 0.5 , 0.75, 1.  ],
           [0.75, 1.  , 1.  , 1.  ]])
    """
    _check_counts(np.asarray(n), np.asarray(c), 1, "k")
    drawn = np.arange(n)
    wrong_left = np.maximum(n - np.asarray(c)[..., None] - drawn, 0)
    return np.asarray(1 - np.cumprod(wrong_left / (n - drawn), axis=-1), dtype=np.float64)


@overload
def pass_at_k_variance(n: int, c: int, k: int) -> float: ...
@overload
def pass_at_k_variance(n: int | IntArray, c: IntArray, k: int) -> FloatArray: ...
def pass_at_k_variance(n: int | IntArray, c: int | IntArray, k: int) -> float | FloatArray:
    """Unbiased variance of `pass_at_k(n, c, k)` over other samples of the same problem; at k = 1 it is p (1 - p) / (n - 1) for p = c / n.

    [C(n - c, k) / C(n, k)]^2 - C(n - c, 2k) / C(n, 2k)

    The last term is the unbiased estimate of (1 - Pass@k)^2, the chance that 2k samples are all wrong. Never negative.

    Args:
        n: samples per problem, at least 2k: with fewer there is no unbiased estimate of this kind.
        c: correct ones among them, 0 <= c <= n.
        k: samples drawn, 1 <= k <= n / 2.

    Returns:
        A float for numbers, else float64 of the broadcast shape.

    Raises:
        ValueError: a count outside its range, or not a whole number.

    >>> pass_at_k_variance(4, 2, 1) == 0.25 / 3
    True
    """
    _check_counts(np.asarray(n), np.asarray(c), 2 * k, "2k")
    return _estimate(_pass_variance_ratio, n, c, k, "k")


@overload
def signal_at_g(n: int, c: int, g: int) -> float: ...
@overload
def signal_at_g(n: int | IntArray, c: IntArray, g: int) -> FloatArray: ...
def signal_at_g(n: int | IntArray, c: int | IntArray, g: int) -> float | FloatArray:
    """Chance that a group of g samples holds both a correct and a wrong one: only such a group moves the policy in GRPO.

    signal@G = 1 - [C(c, g) + C(n - c, g)] / C(n, g)

    Args:
        n: samples per problem; one number, or integers that broadcast with `c`.
        c: correct ones among them, 0 <= c <= n.
        g: size of the group, 1 <= g <= n.

    Returns:
        A float for numbers, else float64 of the broadcast shape.

    Raises:
        ValueError: a count outside its range, or not a whole number.

    Source: the same counting argument as arXiv:2512.22955, Eq. 14, for groups that are all right or all wrong.

    >>> signal_at_g(4, 2, 2) == 4 / 6
    True
    """
    return _estimate(_signal_ratio, n, c, g, "g")


@overload
def avg_at_m(n: int, c: int) -> float: ...
@overload
def avg_at_m(n: int | IntArray, c: IntArray) -> FloatArray: ...
def avg_at_m(n: int | IntArray, c: int | IntArray) -> float | FloatArray:
    """Share of correct samples, Avg@m = c / m with m = n: the same number as Pass@1.

    Args:
        n: samples per problem; one number, or integers that broadcast with `c`.
        c: correct ones among them, 0 <= c <= n.

    Returns:
        A float for numbers, else float64 of the broadcast shape.

    Raises:
        ValueError: a count outside its range, or not a whole number.

    Source: arXiv:2512.22955, "Evaluation of RL Models".

    >>> avg_at_m(8, 2)
    0.25
    """
    return _estimate(_pass_ratio, n, c, 1, "k")


@dataclass(frozen=True)
class Consensus:
    """Outcome of a majority vote.

    Attributes:
        score: 1 or 0 for a clear winner; at a tie the share of correct answers among the tied ones; 0 without a vote.
        tied: two or more answers share the first place.
    """

    score: float
    tied: bool


def cons_at_m(answers: Sequence[str | None], is_correct: Sequence[bool]) -> Consensus:
    """Majority vote over the canonical answers of one problem's samples, Cons@m.

    Args:
        answers: canonical answer of each sample; None where none could be extracted, which does not vote.
        is_correct: grade of each sample, in the same order; equal answers must have equal grades.

    Returns:
        The score, with ties taken as the expectation over a fair draw among the tied answers.

    Raises:
        ValueError: different lengths, no samples, or one answer graded both ways.

    Source: arXiv:2512.22955, "Evaluation of RL Models" (majority voting accuracy).
    Differs: the paper does not say what a tie or a failed extraction counts.

    >>> cons_at_m(["4", "5", "4", None], [True, False, True, False])
    Consensus(score=1.0, tied=False)
    >>> cons_at_m(["4", "5"], [True, False])
    Consensus(score=0.5, tied=True)
    """
    votes = _count_votes(answers, is_correct)
    most = max((count for count, _ in votes), default=0)
    winners = [correct for count, correct in votes if count == most]
    return Consensus(score=sum(winners) / max(len(winners), 1), tied=len(winners) > 1)


def cons_at_k(answers: Sequence[str | None], is_correct: Sequence[bool], k: int) -> float:
    """Expected score of a majority vote of k samples, drawn without replacement from those that exist: the mean of `cons_at_m` over all draws.

    Args:
        answers: canonical answer of each sample; None where none could be extracted, which can be drawn but does not vote.
        is_correct: grade of each sample, in the same order; equal answers must have equal grades.
        k: samples drawn, 1 <= k <= number of samples.

    Returns:
        The expectation over draws and over a fair choice among tied answers, not simulated; equal to `cons_at_m` at k = m.

    Raises:
        ValueError: different lengths, no samples, one answer graded both ways, or k out of range.

    Source: arXiv:2512.22955, "Evaluation of RL Models" (majority voting accuracy).
    Differs: the paper votes among all m samples; for fewer it says nothing.

    >>> cons_at_k(["4", "4", "5"], [True, True, False], 1) == 2 / 3
    True
    """
    votes = _count_votes(answers, is_correct)
    m = len(answers)
    if not 1 <= k <= m:
        raise ValueError(f"k = {k} must be between 1 and the {m} samples that exist")
    # k draws without replacement are independent Binomial(count, k/m) draws from each answer, given that they are k in all.
    chances = [_binomial_chances(count, k, m) for count, _ in votes]
    total = 0.0
    for most in range(1, max((min(count, k) for count, _ in votes), default=0) + 1):
        contenders = [
            (chance, correct)
            for (count, correct), chance in zip(votes, chances, strict=True)
            if count >= most
        ]
        num_others = m - sum(count for count, _ in votes if count >= most)
        total += _share_won_with(most, contenders, _binomial_chances(num_others, k, m))
    return min(1.0, total / float(_binomial_chances(m, k, m)[k]))


def _binomial_chances(count: int, k: int, m: int) -> FloatArray:
    """Chances of 0 to k draws among `count` samples that are drawn with chance k/m each."""
    chances = [
        math.comb(count, drawn) * k**drawn * (m - k) ** (count - drawn) / m**count
        for drawn in range(min(count, k) + 1)
    ]
    return np.array(chances + [0.0] * (k + 1 - len(chances)))


def _share_won_with(most: int, contenders: Sequence[tuple[FloatArray, bool]], others: FloatArray) -> float:
    """Chance of drawing k in all such that the winners have `most` votes, times the share of correct answers among them.

    Args:
        most: votes of the winners.
        contenders: chances of 0 to k draws and the grade of each answer that could have so many.
        others: chances of 0 to k draws of all other samples together.
    """
    k = len(others) - 1
    max_tied = k // most
    more = np.arange(k + 1) - np.arange(k + 1)[:, None]
    # weight[s, d]: chance of d draws so far with s answers at `most` votes and none above; correct_tied[s, d]: the same times the mean
    # number of correct ones among the s.
    weight = np.zeros((max_tied + 1, k + 1))
    weight[0] = others
    correct_tied = np.zeros_like(weight)
    for chance, correct in contenders:
        fewer = np.where((more >= 0) & (more < most), chance[np.abs(more)], 0.0)
        next_weight, next_tied = weight @ fewer, correct_tied @ fewer
        next_weight[1:, most:] += chance[most] * weight[:-1, : k + 1 - most]
        next_tied[1:, most:] += chance[most] * (correct_tied + correct * weight)[:-1, : k + 1 - most]
        weight, correct_tied = next_weight, next_tied
    return float((correct_tied[1:, k] / np.arange(1, max_tied + 1)).sum())


def _count_votes(answers: Sequence[str | None], is_correct: Sequence[bool]) -> list[tuple[int, bool]]:
    """(votes, grade) of each answer that was given."""
    if len(answers) != len(is_correct) or not answers:
        raise ValueError(
            f"{len(answers)} answers and {len(is_correct)} grades; give one grade for each answer"
        )
    grade_of: dict[str, bool] = {}
    for answer, correct in zip(answers, is_correct, strict=True):
        if answer is not None and grade_of.setdefault(answer, bool(correct)) != bool(correct):
            raise ValueError(
                f"answer {answer!r} is graded both correct and wrong; canonicalise before voting"
            )
    votes = Counter(answer for answer in answers if answer is not None)
    return [(count, grade_of[answer]) for answer, count in votes.items()]


def _pass_ratio(n: int, c: int, k: int) -> float:
    total = math.comb(n, k)
    return (total - math.comb(n - c, k)) / total


def _pass_variance_ratio(n: int, c: int, k: int) -> float:
    once, twice = math.comb(n, k), math.comb(n, 2 * k)
    return (math.comb(n - c, k) ** 2 * twice - math.comb(n - c, 2 * k) * once**2) / (once**2 * twice)


def _signal_ratio(n: int, c: int, g: int) -> float:
    total = math.comb(n, g)
    # g = 1 counts every sample once as all right or all wrong: the integers cancel exactly to 0.
    return (total - math.comb(c, g) - math.comb(n - c, g)) / total


def _estimate(
    ratio: Callable[[int, int, int], float], n: int | IntArray, c: int | IntArray, drawn: int, drawn_name: str
) -> float | FloatArray:
    samples, correct = _check_counts(np.asarray(n), np.asarray(c), drawn, drawn_name)
    pairs = list(zip(samples.ravel().tolist(), correct.ravel().tolist(), strict=True))
    # far fewer counts than problems: exact ratios of large integers are worth computing once
    value_of = {(total, right): ratio(total, right, drawn) for total, right in set(pairs)}
    values = [value_of[pair] for pair in pairs]
    if isinstance(n, int) and isinstance(c, int):
        return values[0]
    return np.array(values, dtype=np.float64).reshape(correct.shape)


def _check_counts(
    n: npt.NDArray[Any], c: npt.NDArray[Any], drawn: int, drawn_name: str
) -> tuple[IntArray, IntArray]:
    samples, correct = np.broadcast_arrays(n, c)
    if not (np.issubdtype(samples.dtype, np.integer) and np.issubdtype(correct.dtype, np.integer)):
        raise ValueError(f"n and c must be whole numbers, not {samples.dtype} and {correct.dtype}")
    if correct.size and (correct.min() < 0 or bool((correct > samples).any())):
        raise ValueError("c must be between 0 and n")
    if drawn < 1 or (samples.size and drawn > int(samples.min())):
        fewest = int(samples.min()) if samples.size else 0
        raise ValueError(f"{drawn_name} = {drawn} must be between 1 and the {fewest} samples that exist")
    return samples, correct
