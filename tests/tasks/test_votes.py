"""Which answers are one vote: both directions, a fixed order, no gold answer, and a bounded number of questions."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprior.statistics.estimators import cons_at_m
from rlprior.tasks.problem import Status
from rlprior.tasks.votes import MAX_COMPARED_ANSWERS, Candidate, Compare, merge_answers

RIGHT, WRONG = Status.CORRECT, Status.WRONG


def candidate(name: str, status: Status = WRONG, num_votes: int = 1) -> Candidate:
    """An answer for each name; as a command it has no letters of its own: answers with different ones are not compared."""
    return Candidate(name if name[0].isdigit() else f"\\{name}", name, status, num_votes)


def candidates(*names: str, status: Status = WRONG) -> list[Candidate]:
    return [candidate(name, status) for name in names]


class Oracle:
    """Takes the second of a pair for the first where the pair is listed."""

    def __init__(self, equal: Collection[str], late: Collection[str] = ()) -> None:
        self.equal, self.late = equal, late
        self.asked: list[str] = []

    def __call__(self, pairs: list[list[str]]) -> list[bool | Status]:
        names = ["".join(pair) for pair in pairs]
        self.asked += names
        return [Status.TIMED_OUT if name in self.late else name in self.equal for name in names]


def merge(compare: Compare, *problem: Candidate) -> dict[str, str]:
    [merged] = merge_answers([problem], compare)
    return {one.lstrip("\\"): bucket.lstrip("\\") for one, bucket in merged.items()}


def test_answers_are_merged_where_both_directions_hold() -> None:
    oracle = Oracle({"ab", "ba", "ac"})
    assert merge(oracle, *candidates("a", "b", "c")) == {"a": "a", "b": "a", "c": "c"}
    assert oracle.asked == ["ab", "ba", "ac", "ca"]


def test_an_answer_is_compared_with_what_stands_for_a_bucket_and_not_with_its_members() -> None:
    # a = b and b = c, but a and c differ: what is not transitive is not made so
    assert merge(Oracle({"ab", "ba", "bc", "cb"}), *candidates("a", "b", "c")) == {
        "a": "a",
        "b": "a",
        "c": "c",
    }


def test_the_first_bucket_that_fits_takes_the_answer() -> None:
    merged = merge(Oracle({"ac", "ca", "bc", "cb"}), *candidates("a", "b", "c"))
    assert merged == {"a": "a", "b": "b", "c": "a"}


def test_the_answer_with_most_votes_stands_for_the_others() -> None:
    many = candidate("b", num_votes=5)
    assert merge(Oracle({"ab", "ba"}), *candidates("a"), many) == {"a": "b", "b": "b"}


def test_answers_whose_verdicts_differ_are_neither_merged_nor_compared() -> None:
    """They count apart, as where votes are compared as strings, so that each vote has one verdict."""
    oracle = Oracle({"ab", "ba"})
    merged = merge(oracle, *candidates("a", status=RIGHT), *candidates("b"))
    assert (merged, oracle.asked) == ({"a": "a", "b": "b"}, [])


def test_right_answers_are_not_merged_for_being_right() -> None:
    assert merge(Oracle({"ab"}), *candidates("a", "b", status=RIGHT)) == {"a": "a", "b": "b"}


@pytest.mark.parametrize(
    ("numbers", "num_asked"), [(("1", "2", "1/3"), 0), (("1/3", "0.3333333"), 1), (("1/3", "0.33"), 0)]
)
def test_numbers_that_differ_are_not_compared(numbers: tuple[str, ...], num_asked: int) -> None:
    oracle = Oracle(())
    assert merge(oracle, *candidates(*numbers)) == {number: number for number in numbers}
    assert len(oracle.asked) == num_asked


@pytest.mark.parametrize(
    ("one", "other", "num_asked"),
    [
        ("2x", "2y", 0),
        ("5", "x", 0),
        ("5", r"\sqrt{25}", 2),
        (r"\frac{x}{y}", "x/y", 2),
        ("2 and 5", "2,5", 2),
        ("5", "5x", 0),
    ],
)
def test_answers_with_different_letters_are_not_compared(one: str, other: str, num_asked: int) -> None:
    oracle = Oracle({one + other, other + one})
    problem = [Candidate(text, text, WRONG, num_votes=1) for text in (one, other)]
    [merged] = merge_answers([problem], oracle)
    assert (len(oracle.asked), merged[other]) == (num_asked, one if num_asked else other)


def test_what_is_not_compared_in_time_is_compared_no_more() -> None:
    oracle = Oracle({"bd", "db", "ad", "da", "cd", "dc"}, late={"ab"})
    merged = merge(oracle, *candidates("a", "b", "c", "d"))
    assert merged == {"a": "a", "b": "b", "c": "c", "d": "c"}
    assert oracle.asked == ["ab", "cd", "dc"]


def test_the_number_of_comparisons_is_bounded() -> None:
    oracle = Oracle(())
    names = [f"x_{number}" for number in range(MAX_COMPARED_ANSWERS + 40)]
    merged = merge(oracle, *candidates(*names))
    assert merged == {name: name for name in names}
    assert len(oracle.asked) == MAX_COMPARED_ANSWERS * (MAX_COMPARED_ANSWERS - 1) // 2


def test_problems_are_merged_apart_and_asked_together() -> None:
    batches: list[int] = []

    def compare(pairs: list[list[str]]) -> list[bool | Status]:
        batches.append(len(pairs))
        return [True] * len(pairs)

    merged = merge_answers([candidates("a", "b"), candidates("a"), candidates("a", "c"), []], compare)
    assert merged == [{r"\a": r"\a", r"\b": r"\a"}, {r"\a": r"\a"}, {r"\a": r"\a", r"\c": r"\a"}, {}]
    assert batches == [2, 2]


LETTERS = "abcdef"
PAIRS = [first + second for first in LETTERS for second in LETTERS]


@given(
    st.dictionaries(st.sampled_from(LETTERS), st.integers(1, 3)),
    st.sets(st.sampled_from(PAIRS)),
    st.sets(st.sampled_from(PAIRS), max_size=3),
)
def test_whatever_is_equal_a_vote_has_one_verdict_and_the_same_one_each_time(
    answers: dict[str, int], equal: set[str], late: set[str]
) -> None:
    oracle = Oracle(equal, late)
    problem = {
        name: candidate(name, RIGHT if name in "ace" else WRONG, votes) for name, votes in answers.items()
    }
    merged = merge(oracle, *problem.values())
    assert merged == merge(oracle, *problem.values())
    assert merged.keys() == problem.keys()
    assert all(merged[bucket] == bucket for bucket in merged.values())
    if problem:
        # raises where one answer is graded both ways
        cons_at_m(
            [merged[name] for name in problem for _ in range(problem[name].num_votes)],
            [one.status is RIGHT for one in problem.values() for _ in range(one.num_votes)],
        )
