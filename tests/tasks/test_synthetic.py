"""Generated problems: every printed step recomputed, every answer solved again from the question's own text."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprior.config import UsageError
from rlprior.tasks.problem import Problem, Status
from rlprior.tasks.synthetic import (
    DIFFICULTIES,
    SPACES,
    Split,
    generate_problems,
    permuted_range,
    split_of,
)
from rlprior.tasks.verify import verify

CELLS = list(itertools.product(SPACES, DIFFICULTIES))
SPLITS: tuple[Split, Split] = ("train", "test")


def sample(family: str, difficulty: int, num_problems: int = 300, split: Split = "train") -> list[Problem]:
    return generate_problems(
        families=[family],
        difficulties=[difficulty],
        num_problems=num_problems,
        split=split,
        seed=5,
        unique=False,
    )


def question(problem: Problem) -> str:
    match = re.fullmatch(r"Q: (?P<question>.+)\nA:", problem.prompt)
    assert match
    return match["question"]


def evaluate(expression: str, x: Fraction | None = None) -> Fraction:
    """Exact value of + - * / over decimals, with `x` and its coefficient put in."""
    if x is not None:
        expression = re.sub(r"(\d*)x", lambda match: f"({match[1] or 1}*({x}))", expression)
    assert re.fullmatch(r"[-+*/()0-9.]+", expression), expression
    return eval(re.sub(r"\d+(\.\d+)?", r'F("\g<0>")', expression), {"F": Fraction})


@pytest.mark.parametrize(("family", "difficulty"), CELLS)
def test_solution_ends_with_the_answer_and_is_judged_correct(family: str, difficulty: int) -> None:
    for problem in sample(family, difficulty):
        assert problem.solution.startswith(" ")
        assert problem.solution.endswith(f" #### {problem.answer}")
        assert verify(problem, problem.solution).status is Status.CORRECT
        assert verify(problem, f"#### {Fraction(problem.answer) + 1}").status is Status.WRONG
        assert (problem.task, problem.difficulty) == (family, difficulty)


@pytest.mark.parametrize(("family", "difficulty"), CELLS)
def test_every_printed_step_is_true(family: str, difficulty: int) -> None:
    for problem in sample(family, difficulty):
        x = Fraction(problem.answer) if family == "linear_equations" else None
        steps = problem.solution.split(" #### ")[0].strip().split(", ")
        for step in steps:
            sides = re.split("([<>=])", step)
            assert len(sides) >= 3, problem
            for left, relation, right in zip(sides[:-2:2], sides[1::2], sides[2::2], strict=True):
                one, two = evaluate(left, x), evaluate(right, x)
                assert {"<": one < two, ">": one > two, "=": one == two}[relation], (step, problem)


COLUMNS = [(f, d) for f, d in CELLS if f in ("addition", "subtraction") or (f == "multiplication" and d < 4)]


@pytest.mark.parametrize(("family", "difficulty"), COLUMNS)
def test_columns_spell_the_answer_from_its_units_up(family: str, difficulty: int) -> None:
    for problem in sample(family, difficulty):
        values = [int(step.split("=")[1]) for step in problem.solution.split(" #### ")[0].split(", ")]
        assert min(values) >= 0, problem
        assert family != "subtraction" or max(values) <= 9, problem
        digits = [value % 10 for value in values[:-1]] + [values[-1]]
        assert sum(digit * 10**place for place, digit in enumerate(digits)) == int(problem.answer), problem


def solve(family: str, text: str) -> Fraction:
    """Answer of a question from its text alone, by other means than the generator's."""
    if family in ("addition", "subtraction", "multiplication"):
        return evaluate(text)
    if family == "linear_equations":
        left, right = text.split("=")
        gap = [evaluate(left, Fraction(x)) - evaluate(right, Fraction(x)) for x in (0, 1)]
        return -gap[0] / (gap[1] - gap[0])
    if family == "comparisons":
        return max(Fraction(number) for number in re.findall(r"[0-9./]+", text))
    if family == "sequences":
        return next_term([int(term) for term in text.removesuffix(", ?").split(", ")])
    return solve_story(text)


def next_term(terms: list[int]) -> Fraction:
    if len(terms) == 3:
        return Fraction(terms[2] ** 2, terms[1])
    a, b, c, d = terms
    # The third difference of a sequence of degree two is zero.
    assert d - 3 * c + 3 * b - a == 0
    return Fraction(3 * d - 3 * c + b)


def solve_story(text: str) -> Fraction:
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if "bags" in text:
        a, b, c, d = numbers
        return Fraction(a * b + c * d)
    if "shares" in text:
        a, b, friends, found = numbers
        return Fraction(a * b, friends) + found
    if "boxes" in text:
        a, b, c = numbers
        return Fraction(a * b - c if "loses" in text else a * b + c)
    total = numbers[0]
    for verb, number in re.findall(r"(gets|loses) (\d+)", text):
        total += int(number) if verb == "gets" else -int(number)
    return Fraction(total)


@pytest.mark.parametrize(("family", "difficulty"), CELLS)
def test_answer_solves_the_question(family: str, difficulty: int) -> None:
    for problem in sample(family, difficulty):
        assert Fraction(problem.answer) == solve(family, question(problem))


@pytest.mark.parametrize(("family", "difficulty"), CELLS)
def test_no_question_is_on_both_sides(family: str, difficulty: int) -> None:
    train, test = (sample(family, difficulty, 2000, split) for split in SPLITS)
    assert {p.id for p in train}.isdisjoint(p.id for p in test)
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in test)
    assert all(split_of(p) == "train" for p in train)
    assert all(split_of(p) == "test" for p in test)


@pytest.mark.parametrize("family", SPACES)
def test_difficulties_of_a_family_share_no_question(family: str) -> None:
    ids = [{p.id for split in SPLITS for p in sample(family, d, 2000, split)} for d in DIFFICULTIES]
    assert sum(map(len, ids)) == len(set.union(*ids))


def test_order_of_the_operands_does_not_move_a_question_to_the_other_side() -> None:
    for family, sign in (("addition", "+"), ("multiplication", "*")):
        sides: dict[frozenset[str], set[str]] = {}
        for split in SPLITS:
            for problem in sample(family, 4 if family == "multiplication" else 2, 3000, split):
                sides.setdefault(frozenset(question(problem).split(sign)), set()).add(split)
        assert all(len(found) == 1 for found in sides.values())


def test_about_15_percent_of_the_questions_are_for_testing() -> None:
    counts = [len(universe("addition", 2, split)) for split in SPLITS]
    assert sum(counts) == 90 * 91 // 2
    # 4095 independent draws of 0.15 have a standard deviation of 0.0056: five of them.
    assert abs(counts[1] / sum(counts) - 0.15) < 0.028


def universe(family: str, difficulty: int, split: Split) -> list[Problem]:
    """All problems of a small cell, found by the number that the error names."""
    with pytest.raises(UsageError, match=r"but \d+ exist") as error:
        generate_problems(
            families=[family], difficulties=[difficulty], num_problems=10**6, split=split, seed=0
        )
    found = re.search(r"but (\d+) exist", str(error.value))
    assert found
    return generate_problems(
        families=[family], difficulties=[difficulty], num_problems=int(found[1]), split=split, seed=0
    )


def test_an_exhausted_universe_is_given_whole_under_any_seed() -> None:
    problems = universe("multiplication", 1, "test")
    assert len({p.id for p in problems}) == len(problems)
    again = generate_problems(
        families=["multiplication"], difficulties=[1], num_problems=len(problems), split="test", seed=99
    )
    assert {p.id for p in again} == {p.id for p in problems}
    assert [p.id for p in again] != [p.id for p in problems]


def test_every_cell_has_questions_enough_for_an_evaluation() -> None:
    problems = generate_problems(
        families=list(SPACES), difficulties=DIFFICULTIES, num_problems=40 * len(CELLS), split="test", seed=0
    )
    assert len({p.id for p in problems}) == len(problems)


@given(num_problems=st.integers(0, 60), unique=st.booleans(), seed=st.integers(0, 3))
def test_every_prefix_is_balanced_and_a_prefix_of_the_longer_list(
    num_problems: int, unique: bool, seed: int
) -> None:
    families, difficulties = ["sequences", "addition", "comparisons"], [1, 3]

    def generate(count: int) -> list[Problem]:
        return generate_problems(
            families=families,
            difficulties=difficulties,
            num_problems=count,
            split="train",
            seed=seed,
            unique=unique,
        )

    problems = generate(num_problems)
    assert len(problems) == num_problems
    assert problems == generate(60)[:num_problems]
    counts = Counter((p.task, p.difficulty) for p in problems)
    assert max(counts.values(), default=0) - min(counts[f, d] for f in families for d in difficulties) <= 1


def test_seeds_differ_and_repetition_is_allowed_where_asked_for() -> None:
    first, second = (
        generate_problems(families=["addition"], difficulties=[4], num_problems=50, split="train", seed=seed)
        for seed in (0, 1)
    )
    assert {p.id for p in first} != {p.id for p in second}
    assert len({p.id for p in sample("sequences", 3, 2000)}) < 2000


@pytest.mark.parametrize("family", SPACES)
def test_any_whole_number_is_a_seed_of_its_own(family: str) -> None:
    lists = [
        generate_problems(families=[family], difficulties=[4], num_problems=20, split="train", seed=seed)
        for seed in (0, -1, 2**32, 2**63, 10**30)
    ]
    assert len({tuple(problem.prompt for problem in problems) for problems in lists}) == len(lists)


PROGRAM = """
from rlprior.tasks.synthetic import SPACES, generate_problems
for unique in (True, False):
    for problem in generate_problems(families=list(SPACES), difficulties=[1, 2, 3, 4], num_problems=84, split="test",
                                     seed=3, unique=unique):
        print(problem)
"""


def test_the_same_problems_in_every_process() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("Problem(") == 168


@pytest.mark.parametrize("family", SPACES)
def test_the_documentation_shows_what_is_generated(family: str) -> None:
    [problem] = generate_problems(families=[family], difficulties=[2], num_problems=1, split="train", seed=0)
    page = Path(__file__).parents[2] / "docs" / "data.md"
    assert f"```text\n{problem.text}\n```" in page.read_text(encoding="utf-8")


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_permuted_range_gives_each_number_once(size: int, key: int) -> None:
    assert sorted(permuted_range(size, key)) == list(range(size))


def test_permuted_range_orders_like_chance() -> None:
    size, num_keys = 1000, 400
    firsts = [next(permuted_range(size, key)) for key in range(num_keys)]
    # The mean of 400 uniform draws has a standard deviation of 14.4: five of them.
    assert abs(sum(firsts) / num_keys - size / 2) < 72
    order = list(permuted_range(size, 0))
    ascents = sum(a < b for a, b in itertools.pairwise(order))
    # Ascents of a random permutation have a standard deviation of sqrt(1001 / 12) = 9.1: five of them.
    assert abs(ascents - 499.5) < 46


@pytest.mark.parametrize(
    ("families", "difficulties", "split", "message"),
    [
        (["adition"], [1], "train", "family 'adition' is unknown; write addition, "),
        (["addition"], [5], "train", "difficulty 5 is unknown; write 1, 2, 3, 4"),
        ([], [1], "train", "no family is named"),
        (["addition"], [], "train", "no difficulty is named"),
        (["addition", "addition"], [1], "train", "named twice"),
        (["addition"], [1], "dev", "split 'dev' is unknown; write 'train' or 'test'"),
        (["sequences"], [3], "test", "100000 different test problems of sequences at difficulty 3"),
    ],
)
def test_what_makes_no_sense_is_refused(
    families: list[str], difficulties: list[int], split: Split, message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        generate_problems(
            families=families, difficulties=difficulties, num_problems=100_000, split=split, seed=0
        )
