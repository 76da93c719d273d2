"""Which different answers to one problem are one vote: those that math-verify takes for each other, asked both ways round."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rlprior.tasks.canonical import parse_number
from rlprior.tasks.equivalence import comparison_pair
from rlprior.tasks.problem import Status

MAX_COMPARED_ANSWERS = 16
"""Of a problem's answers only so many are compared, those with the most votes: 120 pairs at most, of up to 0.1 s each."""
NUMBER_TOLERANCE = Fraction(1, 10**6)
"""Numbers further apart are not compared: math-verify rounds to six places."""

_NO_VARIABLES = re.compile(r"\\[a-z]+|\b(?:or|and)\b|[^a-z]")

Compare = Callable[[list[list[str]]], list[bool | Status]]
"""Of pairs (gold, answer), whether the answer is the gold one, or why nobody knows."""


@dataclass(frozen=True)
class Candidate:
    """One of the different answers to a problem.

    Attributes:
        canonical: its canonical form, which names it.
        text: as a response wrote it.
        status: its verdict.
        num_votes: how many responses gave it.
    """

    canonical: str
    text: str
    status: Status
    num_votes: int


def merge_answers(problems: Sequence[Sequence[Candidate]], compare: Compare) -> list[dict[str, str]]:
    """For each problem the canonical form that each of its answers counts as.

    The answers are taken in the order of their votes, the first given first among equals; each joins the first answer before it that
    stands for itself and that it equals in both directions, or else stands for itself. Equivalence is not transitive: an answer is compared
    with what stands for a bucket and nothing else. No comparison involves the gold answer, and answers whose verdicts differ are never
    joined, so that a vote has one verdict: they count apart, as they do where votes are compared as strings.

    Args:
        problems: of each the different answers, in the order in which they were given.
        compare: called with the pairs that many problems wait for at once. Two answers whose comparison did not finish are compared no more.

    Returns:
        A dictionary for each problem, with every answer.
    """
    merging = [_merge_problem(candidates) for candidates in problems]
    merged: list[dict[str, str]] = [{} for _ in problems]
    answers: dict[int, bool | Status | None] = dict.fromkeys(range(len(problems)))
    while answers:
        pairs: dict[int, list[str]] = {}
        for number, answer in answers.items():
            try:
                pairs[number] = merging[number].send(answer)
            except StopIteration as done:
                merged[number] = done.value
        answers = dict(zip(pairs, compare(list(pairs.values())), strict=True)) if pairs else {}
    return merged


def _merge_problem(
    candidates: Sequence[Candidate],
) -> Generator[list[str], bool | Status | None, dict[str, str]]:
    counts_as = {candidate.canonical: candidate.canonical for candidate in candidates}
    open_buckets: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: -one.num_votes)[:MAX_COMPARED_ANSWERS]:
        equal: bool | Status | None = False
        for bucket in open_buckets:
            if bucket.status is not candidate.status or _differ_at_sight(
                bucket.canonical, candidate.canonical
            ):
                continue
            equal = False
            for gold, answer in ((bucket, candidate), (candidate, bucket)):
                pair = comparison_pair(gold.text, answer.text)
                equal = (yield pair) if pair else False
                if equal is not True:
                    break
            if equal is True:
                counts_as[candidate.canonical] = bucket.canonical
                break
            if isinstance(equal, Status):
                open_buckets.remove(bucket)
                break
        if not equal:
            open_buckets.append(candidate)
    return counts_as


def _differ_at_sight(one: str, other: str) -> bool:
    """Whether two canonical forms are different numbers or have different letters: most pairs, and the comparison is slow."""
    values = parse_number(one), parse_number(other)
    if values[0] is not None and values[1] is not None:
        return abs(values[0] - values[1]) > NUMBER_TOLERANCE
    return set(_NO_VARIABLES.sub("", one)) != set(_NO_VARIABLES.sub("", other))
