"""A verifiable problem and what became of one answer to it."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class Status(enum.StrEnum):
    """What became of one response; accuracy counts `CORRECT`, and the others are rates of their own."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    """A finished response that states no answer."""
    TIMED_OUT = "timed_out"
    """Whoever compares or rewards took longer than its deadline."""
    FAILED = "failed"
    """The process that compares or rewards ran out of memory or died."""
    TRUNCATED = "truncated"
    """Cut by the length limit before an answer was finished."""


UNGRADED = (Status.TIMED_OUT, Status.FAILED)
"""What rules alone never give: nothing is known of the response."""


@dataclass(frozen=True)
class Verdict:
    """What became of one response.

    Attributes:
        status: what it counts as.
        extracted: its answer in canonical form, None where none could be extracted.
        given_reward: what a user's reward function said, None without one.
        second_status: where two graders have a verdict each, that of the one that `status` does not follow, else None; where it differs
            from `status` the verdict is disputed.
    """

    status: Status
    extracted: str | None
    given_reward: float | None = field(default=None, repr=False)
    second_status: Status | None = field(default=None, repr=False)

    @property
    def reward(self) -> float:
        """What reinforcement learning is paid: the function's reward, or else 1 for a correct answer and 0 for anything else."""
        return float(self.status is Status.CORRECT) if self.given_reward is None else self.given_reward


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with one right answer.

    Attributes:
        id: names the canonical question: two wordings of one question (37+48 and 48+37) share it.
        task: family of a generated problem, or the file it was read from.
        difficulty: 1 (easiest) to 4 for generated problems, 0 where nobody graded it.
        prompt: exact text that a policy continues; ends right before the answer text.
        solution: worked solution, to follow `prompt` directly; ends with `#### <answer>`.
        answer: the answer alone; of a multiple-choice question its letter.
        written_answer: the answer as a file writes it, where that is not `answer`: for whoever reads more than canonical forms.
        choices: of a multiple-choice question, in the order of their letters.
        group: part of a benchmark that has a score of its own (a subject, a subtask); empty where there is one part alone.
        reference: plain data that a grader needs beyond `answer`: other accepted answers, a program's tests, instructions to follow.
    """

    id: str
    task: str
    difficulty: int
    prompt: str
    solution: str
    answer: str
    written_answer: str | None = None
    choices: tuple[str, ...] = ()
    group: str = ""
    reference: Any = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """Prompt and solution: the document that a language model is trained on."""
        return self.prompt + self.solution


def question_id(task: str, canonical_question: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a question within its task.

    >>> question_id("addition", "37+48")
    '75bf2ea1bc1e836f'
    """
    return hashlib.sha256(f"{task}\n{canonical_question}".encode()).hexdigest()[:16]


def question_prompt(question: str) -> str:
    """The prompt of a question, the same for every task.

    >>> question_prompt("37+48")
    'Q: 37+48\\nA:'
    """
    return f"Q: {question}\nA:"


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choice_question(question: str, choices: Sequence[str]) -> str:
    """A multiple-choice question with its lettered choices, a line each, as it is put into `question_prompt`.

    >>> print(question_prompt(choice_question("Which is even?", ["3", "4"])))
    Q: Which is even?
    (A) 3
    (B) 4
    A:
    """
    lettered = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lettered])
