"""A verifiable problem and what became of one answer to it."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass


class Status(enum.StrEnum):
    """What became of one response; only `CORRECT` earns a reward, and the others are rates of their own."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TIMED_OUT = "timed_out"
    TRUNCATED = "truncated"


@dataclass(frozen=True)
class Verdict:
    """Status of a response, and its answer in canonical form (None where none could be extracted)."""

    status: Status
    extracted: str | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with one right answer.

    Attributes:
        id: names the canonical question: two wordings of one question (37+48 and 48+37) share it.
        task: family of a generated problem, or the file it was read from.
        difficulty: 1 (easiest) to 4 for generated problems, 0 where nobody graded it.
        prompt: exact text that a policy continues; ends right before the answer text.
        solution: worked solution, to follow `prompt` directly; ends with `#### <answer>`.
        answer: the answer alone.
    """

    id: str
    task: str
    difficulty: int
    prompt: str
    solution: str
    answer: str

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
