"""Grades live apart from samples and belong to one version of the grader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rlprior.config import RunError
from rlprior.sampling.grades import Grade, grade, read_grades, write_grades
from rlprior.sampling.store import Sample

SAMPLE = Sample(
    problem_id="p0",
    sample_index=0,
    token_ids=(1,),
    text="4",
    finish_reason="stop",
    log_prob_nats=-1.0,
    num_tokens=1,
)


@dataclass(frozen=True)
class Outcome:
    status: str
    extracted: str | None
    second_status: str | None = None


def judge(responses: Sequence[tuple[str, str, bool]]) -> list[Outcome]:
    return [
        Outcome("truncated", None) if cut else Outcome("correct" if text == problem else "wrong", text)
        for problem, text, cut in responses
    ]


GRADES = [Grade("p0", 0, "correct", "4"), Grade("p0", 1, "wrong", "5"), Grade("p0", 2, "truncated", None)]


def test_each_sample_is_graded_in_order() -> None:
    samples = [
        SAMPLE,
        replace(SAMPLE, sample_index=1, text="5"),
        replace(SAMPLE, sample_index=2, finish_reason="length"),
    ]
    assert grade(samples, {"p0": "4"}, judge) == GRADES


def test_unknown_problem_is_refused() -> None:
    with pytest.raises(RunError, match="unknown problem 'p0'"):
        grade([SAMPLE], {"p1": "4"}, judge)


def test_grades_are_kept_for_their_grader_only(tmp_path: Path) -> None:
    path = tmp_path / "grades.jsonl"
    assert read_grades(path, grader="rules-1") is None
    write_grades(path, GRADES, grader="rules-1")
    assert read_grades(path, grader="rules-1") == GRADES
    assert read_grades(path, grader="rules-2") is None
    path.write_bytes(path.read_bytes()[:-5])
    assert read_grades(path, grader="rules-1") is None
