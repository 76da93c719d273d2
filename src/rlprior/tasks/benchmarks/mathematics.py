"""Mathematics: GSM8K, MATH, and the competitions that models after reinforcement learning are measured on."""

from __future__ import annotations

import re
from dataclasses import replace

from rlprior.tasks.benchmarks.benchmark import Benchmark
from rlprior.tasks.benchmarks.sources import Record, Source
from rlprior.tasks.files import CALCULATOR_MARKS, Gold, read_gold, read_gold_in_solution
from rlprior.tasks.problem import Problem

# MinervaMath writes 4.5e33, which math-verify would read as a product with Euler's number
_SCIENTIFIC = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)e([+-]?[0-9]+)(?!\w)")
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
    worked, mark, stated = CALCULATOR_MARKS.sub("", record.text("answer")).rpartition("####")
    gold = read_gold(stated.strip() if mark else "", record.where)
    prompt = f"Question: {record.text('question')}\nAnswer:"
    return _problem(record, prompt, gold, f" {worked.strip()}\n#### {gold.written_answer}")


def read_math(record: Record) -> Problem:
    r"""A problem with its `answer`, or with a `solution` that states it in the last `\boxed{}`."""
    solution = record.text("solution") if isinstance(record.fields.get("solution"), str) else ""
    answer = record.fields.get("answer")
    gold = (
        read_gold(answer, record.where)
        if answer is not None
        else read_gold_in_solution(solution, record.where)
    )
    gold = replace(gold, written_answer=_SCIENTIFIC.sub(r"\1 \\times 10^{\2}", gold.written_answer))
    worked = f" {solution}" if solution else rf" \boxed{{{gold.written_answer}}}"
    return _problem(record, _math_prompt(record.text("problem", "question")), gold, worked)


def read_olympiadbench(record: Record) -> Problem:
    """`question`, after its `context` if it has one, and `final_answer`, a list; with `is_multiple_answer` all of several answers."""
    several = bool(record["is_multiple_answer"])
    gold = read_gold(list(record.texts("final_answer")), record.where, several=several)
    context = str(record.fields.get("context") or "").strip()
    question = "\n".join(text for text in (context, record.text("question")) if text)
    group = str(record.fields.get("subfield") or "")
    return _problem(record, _math_prompt(question), gold, rf" \boxed{{{gold.written_answer}}}", group)


def _math_prompt(problem: str) -> str:
    return f"Problem:\n{problem}\n\nSolution:"


def _problem(record: Record, prompt: str, gold: Gold, worked: str, group: str = "") -> Problem:
    return Problem(
        id="",
        task="",
        difficulty=0,
        prompt=prompt,
        solution=worked,
        answer=gold.answer,
        written_answer=gold.written_answer,
        group=group or record.part or str(record.fields.get("subject") or ""),
        reference=gold.reference,
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
            files=(
                "olympiadbench/train",
                "olympiadbench/OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP",
            ),
        ),
    ),
    read=read_olympiadbench,
    shots=(),
    instruction=REASON,
    grading="math",
    stop=("\nProblem:",),
)
