"""The sample stores of a run, each with its questions and grades; the same as one parquet table."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError
from rlprior.runs.files import disk_errors, read_jsonl, replacing
from rlprior.sampling.grades import Grade, grades_of, read_grades
from rlprior.sampling.store import Sample, read_samples

UNGRADED = "ungraded"
"""Status of a sample that nobody has graded yet."""
BESIDE = (".grades.jsonl", ".questions.jsonl")
"""Endings of the files beside a store."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked: the exact prompt, the gold answer, and the part of the benchmark that it belongs to."""

    prompt: str
    answer: str
    group: str


@dataclass(frozen=True)
class GradedSample:
    """A sample and its grade, None where nobody has graded it."""

    sample: Sample
    grade: Grade | None

    @property
    def status(self) -> str:
        """The grade's status, or `UNGRADED`."""
        return UNGRADED if self.grade is None else self.grade.status

    @property
    def is_truncated(self) -> bool:
        """Whether it ended at the length limit, answer or not."""
        return self.sample.finish_reason == "length"

    @property
    def is_disputed(self) -> bool:
        """Whether two graders disagree."""
        return self.grade is not None and self.grade.is_disputed


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One store with what lies beside it.

    Attributes:
        path: the store.
        task: name of the task.
        step: of the checkpoint that answered, None where the store's name has none.
        decoding: how tokens were drawn.
        grader: version of the grader, None without grades.
        questions: by problem id; empty where the run wrote none.
        answers: each problem's samples by index, problems in the order sampled.
    """

    path: Path
    task: str
    step: int | None
    decoding: Mapping[str, Any]
    grader: str | None
    questions: Mapping[str, Question]
    answers: Mapping[str, Sequence[GradedSample]]

    @property
    def samples(self) -> Iterator[GradedSample]:
        """All samples, problem by problem."""
        return (one for group in self.answers.values() for one in group)


def questions_of(samples_path: Path) -> Path:
    """Where the questions of a store of samples lie: beside it."""
    return samples_path.with_suffix(".questions.jsonl")


def find_stores(run: Path, tasks: Sequence[str] = ()) -> list[Path]:
    """Sample stores of a run's folder, by name; of these tasks alone where any are given.

    Raises:
        UsageError: no such folder, no samples in it, or none of a task.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: no such folder; give the folder that --out of an evaluation named")
    folder = run if run.name == "samples" else run / "samples"
    stores = [path for path in sorted(folder.glob("*.jsonl")) if not path.name.endswith(BESIDE)]
    if not stores:
        inside = sorted(run.glob("runs/*/samples"))
        hint = f"this is a study; give one of its evaluations, such as {inside[-1].parent}" if inside else ""
        raise UsageError(f"{run}: no samples/*.jsonl there; {hint or 'give the folder of an evaluation'}")
    names = {task_and_step(path)[0] for path in stores}
    unknown = [name for name in tasks if name not in names]
    if unknown:
        raise UsageError(f"{run}: no samples of {unknown[0]!r}; there are {', '.join(sorted(names))}")
    return [path for path in stores if not tasks or task_and_step(path)[0] in tasks]


def task_and_step(samples_path: Path) -> tuple[str, int | None]:
    """Task and step that a store's name says.

    >>> task_and_step(Path("gsm8k-00000400.jsonl")), task_and_step(Path("gsm8k.jsonl"))
    (('gsm8k', 400), ('gsm8k', None))
    """
    match = re.fullmatch(r"(.+)-(\d{8})", samples_path.stem)
    return (match[1], int(match[2])) if match else (samples_path.stem, None)


def read_pool(path: Path) -> Pool:
    """A store with its grades and questions, as far as they are written; the run may still be going on.

    Raises:
        RunError: a file that is damaged.
    """
    samples = read_samples(path)
    task, step = task_and_step(path)
    grades_path = grades_of(path)
    with _damage_told(f"{path}: not a store of samples, or damaged"):
        decoding = _first_line(path)["key"]["decoding"]
    with _damage_told(f"{grades_path}: not a file of grades, or damaged"):
        written = read_grades(grades_path, grader=None) or []
        grades = {(one.problem_id, one.sample_index): one for one in written}
        grader = _first_line(grades_path)["grader"] if grades else None
    answers: dict[str, list[GradedSample]] = {}
    for one in samples:
        grade = grades.get((one.problem_id, one.sample_index))
        answers.setdefault(one.problem_id, []).append(GradedSample(one, grade))
    for group in answers.values():
        group.sort(key=lambda one: one.sample.sample_index)
    return Pool(
        path=path,
        task=task,
        step=step,
        decoding=decoding,
        grader=grader,
        questions=_read_questions(questions_of(path)),
        answers=answers,
    )


def _first_line(path: Path) -> Any:
    with path.open("rb") as file:
        return json.loads(file.readline())


def _read_questions(path: Path) -> dict[str, Question]:
    with _damage_told(f"{path}: not a file of questions, or damaged"):
        return {
            record["id"]: Question(
                prompt=record["prompt"], answer=record["answer"], group=record.get("group", "")
            )
            for record in read_jsonl(path)
        }


@contextlib.contextmanager
def _damage_told(message: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(message) from None


def write_parquet(pools: Sequence[Pool], path: Path) -> int:
    """All samples as a parquet table, a row each. Returns the number of rows.

    Columns: task, step, problem_id, group, prompt, answer, sample_index, text, token_ids, num_tokens, finish_reason, log_prob_nats,
    status, extracted, second_status, disputed. What is not known is null.

    Raises:
        UsageError: pyarrow is not installed.
        RunError: the disk is full; nothing is written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError("--parquet needs pyarrow; install it with: pip install 'rlprior[parquet]'") from None
    text, number = pyarrow.string(), pyarrow.int64()
    schema = pyarrow.schema(
        {
            "task": text,
            "step": number,
            "problem_id": text,
            "group": text,
            "prompt": text,
            "answer": text,
            "sample_index": number,
            "text": text,
            "token_ids": pyarrow.list_(pyarrow.int32()),
            "num_tokens": number,
            "finish_reason": text,
            "log_prob_nats": pyarrow.float64(),
            "status": text,
            "extracted": text,
            "second_status": text,
            "disputed": pyarrow.bool_(),
        }
    )
    num_rows = 0
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside, parquet.ParquetWriter(aside, schema, compression="zstd") as writer:
        for pool in pools:
            rows = [_row(pool, one) for one in pool.samples]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            num_rows += len(rows)
    return num_rows


def _row(pool: Pool, one: GradedSample) -> dict[str, Any]:
    sample, grade = one.sample, one.grade
    question = pool.questions.get(sample.problem_id)
    return {
        "task": pool.task,
        "step": pool.step,
        "problem_id": _whole_text(sample.problem_id),
        "group": _whole_text(question.group) if question else None,
        "prompt": _whole_text(question.prompt) if question else None,
        "answer": _whole_text(question.answer) if question else None,
        "sample_index": sample.sample_index,
        "text": _whole_text(sample.text),
        "token_ids": sample.token_ids,
        "num_tokens": sample.num_tokens,
        "finish_reason": sample.finish_reason,
        "log_prob_nats": sample.log_prob_nats,
        "status": grade.status if grade else None,
        "extracted": _whole_text(grade.extracted) if grade and grade.extracted is not None else None,
        "second_status": grade.second_status if grade else None,
        "disputed": grade.is_disputed if grade else None,
    }


def _whole_text(text: str) -> str:
    r"""Text that UTF-8 can write: halves of surrogate pairs, which JSON can hold, are joined, and lone ones replaced.

    >>> _whole_text("\ud83d\ude00 \ud83d") == "\U0001f600 \ufffd"
    True
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
