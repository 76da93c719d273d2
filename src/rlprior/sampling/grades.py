"""Grades of samples, apart from the samples and keyed by the version of the grader: regrading generates nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from rlprior.config import RunError
from rlprior.runs.files import read_jsonl, write_atomically
from rlprior.sampling.store import Sample

ProblemT = TypeVar("ProblemT")
ProblemT_contra = TypeVar("ProblemT_contra", contravariant=True)


class VerdictLike(Protocol):
    """What a verifier returns: a status, the canonical answer (None where none could be extracted), and a second grader's status or None."""

    @property
    def status(self) -> str: ...
    @property
    def extracted(self) -> str | None: ...
    @property
    def second_status(self) -> str | None: ...


class Grader(Protocol[ProblemT_contra]):
    """Of (problem, response, whether it was cut), a whole batch at once, a verdict for each, in order."""

    def __call__(
        self, responses: Sequence[tuple[ProblemT_contra, str, bool]], /
    ) -> Sequence[VerdictLike]: ...


@dataclass(frozen=True)
class Grade:
    """Verdict on one sample: the status's text, the canonical answer or None, and what a second grader says, None without one."""

    problem_id: str
    sample_index: int
    status: str
    extracted: str | None
    second_status: str | None = None

    @property
    def is_disputed(self) -> bool:
        """Whether two graders disagree."""
        return self.second_status not in (None, self.status)


def grade(
    samples: Iterable[Sample], problems: Mapping[str, ProblemT], grader: Grader[ProblemT]
) -> list[Grade]:
    """Grade each sample, in order; a sample that ended at the length limit is graded as truncated.

    Raises:
        RunError: a sample of a problem that is not given.
    """
    samples = list(samples)
    responses: list[tuple[ProblemT, str, bool]] = []
    for sample in samples:
        problem = problems.get(sample.problem_id)
        if problem is None:
            raise RunError(f"sample {sample.sample_index} answers the unknown problem {sample.problem_id!r}")
        responses.append((problem, sample.text, sample.finish_reason == "length"))
    return [
        Grade(
            sample.problem_id,
            sample.sample_index,
            str(verdict.status),
            verdict.extracted,
            None if verdict.second_status is None else str(verdict.second_status),
        )
        for sample, verdict in zip(samples, grader(responses), strict=True)
    ]


def write_grades(path: Path, grades: Sequence[Grade], *, grader: str) -> None:
    """Write the grades under the grader's version, whole or not at all."""
    records: list[Mapping[str, object]] = [{"grader": grader, "num_grades": len(grades)}]
    records += [dataclasses.asdict(one) for one in grades]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def grades_of(samples_path: Path) -> Path:
    """Where the grades of a store of samples lie: beside it."""
    return samples_path.with_suffix(".grades.jsonl")


def read_grades(path: Path, *, grader: str | None) -> list[Grade] | None:
    """Grades by that version of the grader (None: by any); None where there are none, or only another version's."""
    header, *records = read_jsonl(path) or [{}]
    if header.get("num_grades") != len(records) or grader not in (None, header.get("grader")):
        return None
    return [Grade(**record) for record in records]
