"""Mathematics: GSM8K, MATH, and the competitions that models after reinforcement learning are measured on."""

from __future__ import annotations

from rlprior.config import RunError
from rlprior.evaluation.benchmarks.benchmark import Benchmark
from rlprior.evaluation.benchmarks.sources import Record, Source
from rlprior.tasks.files import CALCULATOR_MARKS
from rlprior.tasks.problem import Problem
from rlprior.tasks.verify import canonical_answer, last_boxed

REASON = r"Reason step by step, and write the final answer in \boxed{}."
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def read_gsm8k(record: Record) -> Problem:
    """`question` and `answer`, a worked solution that ends with `#### <answer>`."""
    worked, _, gold = CALCULATOR_MARKS.sub("", record.text("answer")).rpartition("####")
    prompt = f"Question: {record.text('question')}\nAnswer:"
    return _problem(record, prompt, gold, f" {worked.strip()}\n#### {gold.strip()}")


def read_math(record: Record) -> Problem:
    r"""A problem with its `answer`, or with a `solution` that states it in the last `\boxed{}`."""
    prompt = f"Problem:\n{record.text('problem', 'question')}\n\nSolution:"
    solution = record.text("solution") if isinstance(record.fields.get("solution"), str) else ""
    gold = (
        record.text("answer") if record.fields.get("answer") not in (None, "") else last_boxed(solution) or ""
    )
    return _problem(record, prompt, gold, f" {solution}" if solution else rf" \boxed{{{gold}}}")


def read_olympiadbench(record: Record) -> Problem:
    """`question`, after its `context` if it has one, and `final_answer`, a list; several answers are one set."""
    question = "\n".join(text for text in (record.fields.get("context"), record.text("question")) if text)
    gold = ", ".join(answer.strip("$ ") for answer in record.texts("final_answer"))
    prompt = f"Problem:\n{question.strip()}\n\nSolution:"
    return _problem(record, prompt, gold, rf" \boxed{{{gold}}}", str(record.fields.get("subfield") or ""))


def _problem(record: Record, prompt: str, gold: str, solution: str, group: str = "") -> Problem:
    answer = canonical_answer(gold)
    if not answer:
        raise RunError(f"{record.where}: no gold answer in {', '.join(record.fields)}")
    return Problem(
        id="",
        task="",
        difficulty=0,
        prompt=prompt,
        solution=solution,
        answer=answer,
        written_answer=gold.strip() if gold.strip() != answer else None,
        group=group or record.part or str(record.fields.get("subject") or ""),
    )


def _math_sources(split: str) -> tuple[Source, ...]:
    return tuple(
        Source(repo="EleutherAI/hendrycks_math", subset=subject, split=split, folder="math", part=subject)
        for subject in SUBJECTS
    )


GSM8K = Benchmark(
    name="gsm8k",
    title="GSM8K",
    category="Mathematics",
    questions=(Source(repo="openai/gsm8k", subset="main", split="test", folder="gsm8k"),),
    read=read_gsm8k,
    shots=(Source(repo="openai/gsm8k", subset="main", split="train", folder="gsm8k"),),
    instruction=REASON,
    stop=("\nQuestion:",),
)


def _competition(name: str, title: str, *questions: Source) -> Benchmark:
    """Problems whose worked examples are MATH's training side."""
    return Benchmark(
        name=name,
        title=title,
        category="Mathematics",
        questions=questions,
        read=read_math,
        shots=_math_sources("train"),
        instruction=REASON,
        grading="math",
        stop=("\nProblem:",),
    )


MATH = _competition("math", "MATH", *_math_sources("test"))
MATH500 = _competition(
    "math500", "MATH-500", Source(repo="HuggingFaceH4/MATH-500", split="test", folder="math500")
)
MINERVA = _competition(
    "minerva", "MinervaMath", Source(repo="math-ai/minervamath", split="test", folder="minerva")
)
AMC23 = _competition("amc23", "AMC23", Source(repo="math-ai/amc23", split="test", folder="amc23"))
AIME24 = _competition("aime24", "AIME24", Source(repo="math-ai/aime24", split="test", folder="aime24"))
AIME25 = _competition("aime25", "AIME25", Source(repo="math-ai/aime25", split="test", folder="aime25"))
OLYMPIADBENCH = Benchmark(
    name="olympiadbench",
    title="OlympiadBench",
    category="Mathematics",
    questions=(
        Source(
            repo="Hothan/OlympiadBench",
            subset="OE_TO_maths_en_COMP",
            split="train",
            folder="olympiadbench",
            files=("olympiadbench/OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP",),
        ),
    ),
    read=read_olympiadbench,
    shots=(),
    instruction=REASON,
    grading="math",
    stop=("\nProblem:",),
)
