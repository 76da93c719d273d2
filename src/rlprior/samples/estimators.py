"""Unbiased estimates from n samples of a problem, c of them correct.

Every ratio of binomials is taken between exact integers and rounded once, so nothing overflows or cancels at any n.
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
    most = max(votes.values(), default=0)
    winners = [grade_of[answer] for answer, count in votes.items() if count == most]
    return Consensus(score=sum(winners) / max(len(winners), 1), tied=len(winners) > 1)


def _pass_ratio(n: int, c: int, k: int) -> float:
    total = math.comb(n, k)
    return (total - math.comb(n - c, k)) / total


def _signal_ratio(n: int, c: int, g: int) -> float:
    total = math.comb(n, g)
    # g = 1 counts every sample once as all right or all wrong: the integers cancel exactly to 0.
    return (total - math.comb(c, g) - math.comb(n - c, g)) / total


def _estimate(
    ratio: Callable[[int, int, int], float], n: int | IntArray, c: int | IntArray, drawn: int, drawn_name: str
) -> float | FloatArray:
    samples, correct = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if not (np.issubdtype(samples.dtype, np.integer) and np.issubdtype(correct.dtype, np.integer)):
        raise ValueError(f"n and c must be whole numbers, not {samples.dtype} and {correct.dtype}")
    if correct.size and (correct.min() < 0 or bool((correct > samples).any())):
        raise ValueError("c must be between 0 and n")
    if drawn < 1 or (samples.size and drawn > int(samples.min())):
        fewest = int(samples.min()) if samples.size else 0
        raise ValueError(f"{drawn_name} = {drawn} must be between 1 and the {fewest} samples that exist")
    pairs = zip(samples.ravel().tolist(), correct.ravel().tolist(), strict=True)
    values = [ratio(int(total), int(right), drawn) for total, right in pairs]
    if isinstance(n, int) and isinstance(c, int):
        return values[0]
    return np.array(values, dtype=np.float64).reshape(correct.shape)
