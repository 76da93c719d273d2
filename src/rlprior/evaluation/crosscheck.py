"""Cross-check with lm-evaluation-harness: it scores the stored samples of an evaluation, and every difference is explained."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError
from rlprior.evaluation.harness import (
    NO_MATCH,
    TASK_FILES,
    Filter,
    HarnessTask,
    Score,
    load_tasks,
    make_document,
    require_harness,
)
from rlprior.sampling.grades import Grade
from rlprior.sampling.pools import read_pool
from rlprior.sampling.store import Sample
from rlprior.tasks.benchmarks.benchmark import load_benchmark
from rlprior.tasks.benchmarks.sources import read_source
from rlprior.tasks.benchmarks.suites import BENCHMARKS
from rlprior.tasks.problem import UNGRADED, Status
from rlprior.tasks.verify import canonical_answer, chosen_letter, find_answer

MAX_SHOWN_CHARACTERS = 300


class Reason(enum.StrEnum):
    """Why one response counts as correct in one place and not in the other; of several reasons the first in this order."""

    GOLD = "the gold answers differ"
    NO_VERDICT = "our verifier did not finish: nothing is known of the response"
    STOP_STRING = "there the response ends at a stop string that it was not sampled with"
    LENGTH_LIMIT = (
        "the length limit cut the response before its answer was finished, which does not count here"
    )
    NOT_STATED = "the response states no answer in a form that counts here; their pattern finds one"
    NOT_FOUND = "their pattern does not find the form in which the answer is stated"
    SPELLING = "one answer, compared as a value here and as text there"
    DELETED_CHARACTERS = "they delete commas, dollar signs or punctuation before they compare"
    FIRST = "of several statements the first counts there and the last here"
    PART = "their pattern takes a part of the stated answer"
    MORE = "their pattern takes more than the stated answer"
    LAST_NUMBER = "the last number, or lone sign, of the response counts there and the stated answer here"
    ELSEWHERE = "their pattern reads another place of the response"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One response as both sides read it.

    Attributes:
        response: the whole of it, which is graded here.
        text: what of it lm-evaluation-harness reads: all that comes before a stop string of its task.
        grade: ours.
        score: theirs.
        has_same_gold: both compare with one answer.
        choices: of a multiple-choice question.
    """

    response: str
    text: str
    grade: Grade
    score: Score
    has_same_gold: bool
    choices: tuple[str, ...] = ()

    @property
    def is_correct_here(self) -> bool:
        """Our verdict."""
        return self.grade.status == Status.CORRECT

    @property
    def differs(self) -> bool:
        """Whether it counts as correct on one side alone."""
        return self.is_correct_here != self.score.is_correct

    def canonical(self, text: str) -> str:
        """Our canonical form of what their pattern took."""
        return chosen_letter(text, self.choices) if self.choices else canonical_answer(text)


def explain(reading: Reading, used: Filter) -> Reason:
    """Why a response that differs does, from what each side extracted and where."""
    grade, score = reading.grade, reading.score
    if not reading.has_same_gold:
        return Reason.GOLD
    if grade.status in UNGRADED:
        return Reason.NO_VERDICT
    found = find_answer(reading.text, reading.choices)
    if reading.text != reading.response and (found.canonical if found else None) != grade.extracted:
        return Reason.STOP_STRING
    if grade.status == Status.TRUNCATED:
        return Reason.LENGTH_LIMIT
    if grade.status == Status.UNPARSABLE:
        return Reason.NOT_STATED
    if score.extracted == NO_MATCH:
        return Reason.NOT_FOUND
    if reading.canonical(score.extracted) == grade.extracted:
        return Reason.SPELLING if reading.is_correct_here else Reason.DELETED_CHARACTERS
    return _explain_place(reading, used)


def _explain_place(reading: Reading, used: Filter) -> Reason:
    """The same for two answers that are not one."""
    matches = used.matches(reading.text)
    if not used.takes_last and any(
        reading.canonical(match[match.lastindex or 0]) == reading.grade.extracted for match in matches[:-1]
    ):
        return Reason.FIRST
    found = find_answer(reading.text, reading.choices)
    if found and matches:
        taken = matches[-1].lastindex or 0
        start = matches[-1].start(taken)
        # a number of theirs takes along the full stop of its sentence
        if _is_inside(reading.text, start, start + len(matches[-1][taken].rstrip(".,")), found.text):
            return Reason.PART
        if not used.takes_last and found.text in reading.score.extracted:
            return Reason.MORE
    return Reason.LAST_NUMBER if used.takes_last else Reason.ELSEWHERE


def _is_inside(text: str, start: int, end: int, part: str) -> bool:
    """Whether `text[start:end]` lies inside an occurrence of `part`."""
    place = text.find(part)
    while place >= 0:
        if place <= start and end <= place + len(part):
            return True
        place = text.find(part, place + 1)
    return False


def crosscheck(run: Path, data_dir: Path | None) -> dict[str, Any]:
    """Scores of an evaluation's stored samples here and by lm-evaluation-harness, and each response that differs.

    Args:
        run: folder that `rlprior evaluate --suite` wrote, with `samples/gsm8k.jsonl` or `samples/mmlu.jsonl`, or both.
        data_dir: folder of the benchmarks' files, None for the hub: gold answers are read anew.

    Returns:
        format, lm_eval (its version), reasons (their meanings), and of each benchmark its scorers: task, version, filter, num_responses,
        ours, theirs, difference (ours - theirs), reasons (how often each) and differing (each response, with what both extracted).

    Raises:
        UsageError: lm-evaluation-harness is not installed, or there is nothing that it scores.
        RunError: damaged files, or questions that the data does not hold.
    """
    version = require_harness()
    names = [name for name in TASK_FILES if (run / "samples" / f"{name}.jsonl").is_file()]
    if not names:
        expected = " or ".join(f"samples/{name}.jsonl" for name in TASK_FILES)
        raise UsageError(
            f"{run}: no {expected}; give the folder of a 'rlprior evaluate --suite' that sampled one of them"
        )
    return {
        "format": 1,
        "lm_eval": version,
        "reasons": {reason.name.lower(): reason.value for reason in Reason},
        "benchmarks": {name: _check_benchmark(name, run, data_dir) for name in names},
    }


def _check_benchmark(name: str, run: Path, data_dir: Path | None) -> dict[str, Any]:
    pool = read_pool(run / "samples" / f"{name}.jsonl")
    graded = [(one.sample, one.grade) for one in pool.samples if one.grade]
    if len(graded) < len(list(pool.samples)) or not pool.answers.keys() <= pool.questions.keys():
        raise RunError(f"{pool.path}: its grades or questions are not all there; evaluate again")
    documents = read_documents(name, data_dir)
    for problem_id in pool.answers:
        if problem_id not in documents:
            end = pool.questions[problem_id].prompt[-80:]
            raise RunError(
                f"{name}: the data does not hold the question of problem {problem_id} ({end!r}); give the --data-dir of the evaluation"
            )
    gold = {problem_id: pool.questions[problem_id].answer for problem_id in pool.answers}
    tasks = load_tasks(name, next(iter(documents.values())))
    return {
        "num_problems": len(pool.answers),
        "num_responses": len(graded),
        "scorers": [scorer for task in tasks for scorer in _check_task(task, graded, gold, documents)],
    }


def read_documents(name: str, data_dir: Path | None) -> dict[str, dict[str, Any]]:
    """Every record of a benchmark as a document of lm-evaluation-harness's, by the id of its question.

    Raises:
        UsageError: data that is not there, with the path or command that gives it.
        RunError: a record that cannot be read.
    """
    benchmark = BENCHMARKS[name]
    problems = load_benchmark(benchmark, num_shots=0, data_dir=data_dir)
    records = (record for source in benchmark.questions for record in read_source(source, data_dir))
    return {
        problem.id: make_document(name, record) for problem, record in zip(problems, records, strict=True)
    }


def _check_task(
    task: HarnessTask,
    graded: Sequence[tuple[Sample, Grade]],
    gold: Mapping[str, str],
    documents: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """What each of a task's filters says of the samples; `gold` are our answers."""
    texts = [task.cut(sample.text) for sample, _ in graded]
    responses = [(sample.problem_id, text) for (sample, _), text in zip(graded, texts, strict=True)]
    scores = task.score(documents, responses)
    has_same_gold = {
        problem_id: _is_same_gold(answer, task.gold(documents[problem_id]), _choices(documents[problem_id]))
        for problem_id, answer in gold.items()
    }
    checked: list[dict[str, Any]] = []
    for used in task.filters:
        readings = [
            Reading(
                response=sample.text,
                text=text,
                grade=grade,
                score=score,
                has_same_gold=has_same_gold[sample.problem_id],
                choices=_choices(documents[sample.problem_id]),
            )
            for (sample, grade), text, score in zip(graded, texts, scores[used.name], strict=True)
        ]
        checked.append(
            {"task": task.name, "version": task.version, **_summarise(readings, used, task, documents)}
        )
    return checked


def _choices(document: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(document.get("choices", ()))


def _is_same_gold(ours: str, theirs: str, choices: Sequence[str]) -> bool:
    """Whether their gold answer (`... #### 18`, `(B)`) is ours."""
    if choices:
        return chosen_letter(theirs, choices) == ours
    return canonical_answer(theirs.rpartition("####")[2]) == canonical_answer(ours)


def _summarise(
    readings: Sequence[Reading],
    used: Filter,
    task: HarnessTask,
    documents: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    differing = [(reading, explain(reading, used)) for reading in readings if reading.differs]
    counts = Counter(reason.name.lower() for _, reason in differing)
    ours = sum(reading.is_correct_here for reading in readings)
    theirs = sum(reading.score.is_correct for reading in readings)
    return {
        "filter": used.name,
        "num_responses": len(readings),
        "ours": ours / len(readings),
        "theirs": theirs / len(readings),
        "difference": (ours - theirs) / len(readings),
        "reasons": dict(counts.most_common()),
        "differing": [
            {
                "problem_id": reading.grade.problem_id,
                "sample_index": reading.grade.sample_index,
                "reason": reason.name.lower(),
                "our_status": reading.grade.status,
                "our_answer": reading.grade.extracted,
                "their_answer": reading.score.extracted,
                "they_count_it": reading.score.is_correct,
                "gold": task.gold(documents[reading.grade.problem_id]).rpartition("####")[2].strip(),
                "response_end": reading.text[-MAX_SHOWN_CHARACTERS:],
            }
            for reading, reason in differing
        ],
    }


def describe_crosscheck(report: Mapping[str, Any]) -> str:
    """The scores of each benchmark, and how often which reason makes them differ."""
    lines = [f"lm-evaluation-harness {report['lm_eval']} on the same samples"]
    for name, benchmark in report["benchmarks"].items():
        counts = (
            _counted(benchmark["num_responses"], "response"),
            _counted(benchmark["num_problems"], "question"),
        )
        lines.append(f"{name}: {' to '.join(counts)}")
        for scorer in benchmark["scorers"]:
            num_differing = len(scorer["differing"])
            verb = "differs" if num_differing == 1 else "differ"
            lines.append(
                f"  {scorer['task']} {scorer['version']}, {scorer['filter']}: ours {scorer['ours']:.4f}, "
                f"theirs {scorer['theirs']:.4f}, difference {scorer['difference']:+.4f}; "
                + (f"{_counted(num_differing, 'response')} {verb}" if num_differing else "all agree")
            )
            lines += [
                f"    {count:6,} {report['reasons'][reason]}" for reason, count in scorer["reasons"].items()
            ]
    return "\n".join(lines)


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
