"""Seeded generator of verifiable problems: which numbers each family and difficulty uses, and which side of the split they are on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from rlprior.config import UsageError
from rlprior.seeding import numpy_generator, stream_seed
from rlprior.tasks import families as pose
from rlprior.tasks.problem import Problem, question_id, question_prompt

Split = Literal["train", "test"]
TEST_SHARE = 0.15
DIFFICULTIES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Space:
    """The numbers that one family uses at one difficulty: every combination of `ranges`, handed to `question_of`."""

    question_of: Callable[..., pose.Question | None]
    ranges: tuple[Sequence[int], ...]

    @property
    def size(self) -> int:
        """Number of combinations; several can pose one question in other words."""
        size = 1
        for values in self.ranges:
            size *= len(values)
        return size

    def question(self, index: int) -> pose.Question | None:
        """Question of combination `index`, None where its numbers make none."""
        numbers: list[int] = []
        for values in self.ranges:
            index, position = divmod(index, len(values))
            numbers.append(values[position])
        return self.question_of(*numbers)


_NON_TERMINATING = (3, 6, 7, 9, 11, 12, 13)
_WORDING = (range(len(pose.NAMES)), range(len(pose.THINGS)))
_KINDS = range(2)

SPACES: dict[str, tuple[Space, Space, Space, Space]] = {
    "addition": (
        Space(pose.addition, (range(100), range(10))),
        Space(pose.addition, (range(10, 100), range(10, 100))),
        Space(pose.addition, (range(100, 1000), range(100, 1000))),
        Space(pose.addition, (range(1000, 10_000), range(1000, 10_000))),
    ),
    "subtraction": (
        Space(pose.subtraction, (range(10, 100), range(10))),
        Space(pose.subtraction, (range(10, 100), range(10, 100))),
        Space(pose.subtraction, (range(100, 1000), range(100, 1000))),
        Space(pose.subtraction, (range(1000, 10_000), range(1000, 10_000))),
    ),
    "multiplication": (
        Space(pose.multiplication, (range(2, 50), range(2, 10))),
        Space(pose.multiplication, (range(50, 200), range(2, 10))),
        Space(pose.multiplication, (range(200, 1000), range(2, 10))),
        Space(pose.multiplication, (range(11, 100), range(11, 100))),
    ),
    "linear_equations": (
        Space(pose.shift_equation, (range(1, 61), range(1, 31))),
        Space(pose.scaled_equation, (range(1, 21), range(2, 10), range(1, 21))),
        Space(pose.scaled_equation, (range(-20, 21), range(2, 10), range(-20, 0))),
        Space(
            pose.two_sided_equation, (range(1, 13), range(2, 7), range(2, 7), (*range(-9, 0), *range(1, 10)))
        ),
    ),
    "word_problems": (
        Space(pose.one_step_story, (_KINDS, range(2, 31), range(2, 21), *_WORDING)),
        Space(pose.two_step_story, (_KINDS, range(10, 31), range(2, 21), range(2, 10), *_WORDING)),
        Space(pose.box_story, (_KINDS, range(2, 10), range(5, 13), range(1, 10), *_WORDING)),
        Space(pose.sharing_story, (_KINDS, range(2, 10), range(2, 10), range(2, 6), range(2, 10), *_WORDING)),
    ),
    "comparisons": (
        Space(pose.compare_integers, (range(1), range(10, 100), range(10, 100))),
        Space(pose.compare_integers, (range(1, 100), range(100), range(100))),
        Space(pose.compare_decimals, (range(10), range(1, 10), range(1, 100), range(2))),
        Space(pose.compare_fractions, (range(1, 13), _NON_TERMINATING, range(1, 13), _NON_TERMINATING)),
    ),
    "sequences": (
        Space(pose.arithmetic_sequence, (range(1, 61), range(2, 16))),
        Space(pose.arithmetic_sequence, (range(20, 121), range(-15, -1))),
        Space(pose.geometric_sequence, (range(2, 100), range(2, 6))),
        Space(pose.quadratic_sequence, (range(21), range(1, 16), range(1, 7))),
    ),
}


def split_of(problem: Problem) -> Split:
    """Side of the split a problem is on: a property of its canonical question, the same under every seed.

    `test` where the first 32 bits of the id, a hash of the canonical question, are below 15% of their range.
    """
    return "test" if int(problem.id[:8], 16) < TEST_SHARE * 2**32 else "train"


def generate_problems(
    *,
    families: Sequence[str],
    difficulties: Sequence[int],
    num_problems: int,
    split: Split,
    seed: int,
    unique: bool = True,
) -> list[Problem]:
    """Problems of one side of the split, balanced over families x difficulties; every prefix of the list is balanced too.

    Args:
        families: names out of `SPACES`.
        difficulties: 1 (easiest) to 4.
        num_problems: how many.
        split: `train` or `test`.
        seed: same arguments, same problems, in every process.
        unique: never the same canonical question twice; False draws with repetition, for training text.

    Raises:
        UsageError: an unknown family, difficulty or split, or (unique) more problems than exist.

    >>> generate_problems(families=["addition"], difficulties=[2], num_problems=1, split="test", seed=0)[0].text
    'Q: ...+...\\nA: ... #### ...'
    """
    check_families(families, difficulties)
    if split not in get_args(Split):
        raise UsageError(f"split {split!r} is unknown; write 'train' or 'test'")
    cells = [(family, difficulty) for family in families for difficulty in difficulties]
    columns = [
        _cell_problems(family, difficulty, len(range(cell, num_problems, len(cells))), split, seed, unique)
        for cell, (family, difficulty) in enumerate(cells)
    ]
    return [columns[i % len(cells)][i // len(cells)] for i in range(num_problems)]


def check_families(families: Sequence[str], difficulties: Sequence[int]) -> None:
    """Raise UsageError unless all families and difficulties exist and none is named twice."""
    for name, values, known in (
        ("family", families, tuple(SPACES)),
        ("difficulty", difficulties, DIFFICULTIES),
    ):
        if not values:
            raise UsageError(f"no {name} is named; write at least one of {', '.join(map(str, known))}")
        for value in values:
            if value not in known:
                raise UsageError(f"{name} {value!r} is unknown; write {', '.join(map(str, known))}")
        if len(set(values)) < len(values):
            raise UsageError(f"a {name} is named twice in {tuple(values)}; name each once")


def _cell_problems(
    family: str, difficulty: int, num_problems: int, split: Split, seed: int, unique: bool
) -> list[Problem]:
    space = SPACES[family][difficulty - 1]
    names = ("problems", family, difficulty, split)
    if unique:
        indices = permuted_range(space.size, stream_seed(seed, *names))
    else:
        indices = _endless_draws(space.size, numpy_generator(seed, *names))
    problems: list[Problem] = []
    seen: set[str] = set()
    for index in indices if num_problems else ():
        problem = _pose_problem(family, difficulty, space, index)
        if problem is None or split_of(problem) != split or (unique and problem.id in seen):
            continue
        seen.add(problem.id)
        problems.append(problem)
        if len(problems) == num_problems:
            return problems
    if len(problems) < num_problems:
        raise UsageError(
            f"{num_problems} different {split} problems of {family} at difficulty {difficulty} were asked for but "
            f"{len(problems)} exist; ask for fewer, or add families or difficulties"
        )
    return problems


def _pose_problem(family: str, difficulty: int, space: Space, index: int) -> Problem | None:
    question = space.question(index)
    if question is None:
        return None
    return Problem(
        id=question_id(family, question.canonical),
        task=family,
        difficulty=difficulty,
        prompt=question_prompt(question.text),
        solution=f" {question.steps} #### {question.answer}",
        answer=question.answer,
    )


def _endless_draws(size: int, generator: np.random.Generator) -> Iterator[int]:
    while True:
        yield from generator.integers(size, size=1024).tolist()


def permuted_range(size: int, key: int) -> Iterator[int]:
    """`range(size)` in a pseudo-random order, each number once, without storing it.

    A four-round Feistel network permutes the next power of four; what falls outside the range is skipped.

    >>> sorted(permuted_range(10, key=7)) == list(range(10))
    True
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    round_keys = [stream_seed(key, round_number) for round_number in range(4)]
    for position in range(1 << 2 * half):
        left, right = position >> half, position & mask
        for round_key in round_keys:
            mixed = (right + round_key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 40 & mask)
        if (value := left << half | right) < size:
            yield value
