"""Logic reasoning: ARC, BIG-Bench Hard and MuSR."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlprior.config import UsageError
from rlprior.tasks.benchmarks.benchmark import Benchmark, Examples
from rlprior.tasks.benchmarks.prompts import (
    check_choices,
    gold_letter,
    labelled_choices,
    likelihood_problem,
    split_examples,
)
from rlprior.tasks.benchmarks.sources import Record, Source
from rlprior.tasks.files import read_lines
from rlprior.tasks.problem import Problem

BBH_TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)


def read_arc(record: Record) -> Problem:
    """`question`, `choices` with `label` (letters or digits) and `text`, and `answerKey`."""
    labels, texts = labelled_choices(record, "choices")
    prompt = f"Question: {record.text('question')}\nAnswer:"
    return likelihood_problem(prompt, texts, gold_letter(record, "answerKey", labels))


def read_bbh(record: Record) -> Problem:
    """`input` and `target` of the part's task."""
    target = record.text("target")
    return Problem(
        id="",
        task="",
        difficulty=0,
        prompt=f"Q: {record.text('input')}\nA: Let's think step by step.",
        solution=f" So the answer is {target}.",
        answer=target,
        group=record.part,
    )


def read_bbh_examples(task: str, data_dir: Path | None) -> Examples:
    """The three worked examples of a task's file of prompts, in the layout of BIG-Bench Hard's repository or beside its tasks."""
    root = data_dir or Path("DIR")
    paths = (root / "bbh" / f"cot-{task}.txt", root / "bbh" / "cot-prompts" / f"{task}.txt")
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UsageError(
            f"{paths[1]}: no such file; BIG-Bench Hard's worked examples are not on the hub: give --data-dir {root} after "
            f"git clone https://github.com/suzgunmirac/BIG-Bench-Hard {root}/bbh"
        )
    text = "\n".join(line for _, line in read_lines(path))
    _, ruled, body = text.partition("\n-----\n")  # a warning to those who gather text stands above the rule
    return Examples(*split_examples(body if ruled else text, str(path)))


def musr_questions(row: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """A row of the hub is one question; an object of the original files is a story with its questions."""
    if "questions" not in row:
        return (row,)
    return ({"narrative": row.get("context"), **question} for question in row["questions"])


def read_musr(record: Record) -> Problem:
    """`narrative`, `question`, `choices` (a list, or one written in Python) and the position of the answer."""
    choices = record["choices"]
    if isinstance(choices, str):
        try:
            choices = ast.literal_eval(choices)
        except (ValueError, SyntaxError):
            raise record.wrong("choices", "a list of texts") from None
    texts = check_choices(record, "choices", [str(choice).strip() for choice in choices])
    name = "answer_index" if "answer_index" in record.fields else "answer"
    answer = gold_letter(record, name, [str(place) for place in range(len(texts))])
    numbered = "\n".join(f"{number} - {text}" for number, text in enumerate(texts, start=1))
    prompt = f"{record.text('narrative')}\n\n{record.text('question')}\n\n{numbered}\n\nAnswer:"
    return likelihood_problem(prompt, texts, answer, group=record.part)


ARC_EASY, ARC_CHALLENGE = (
    Benchmark(
        name=name,
        title=title,
        category="Logic Reasoning",
        questions=(Source(repo="allenai/ai2_arc", subset=subset, split="test", folder=name),),
        read=read_arc,
        shots=(Source(repo="allenai/ai2_arc", subset=subset, split="train", folder=name),),
        metric="likelihood",
        length_normalised=True,
    )
    for name, title, subset in (
        ("arc_easy", "ARC-Easy", "ARC-Easy"),
        ("arc_challenge", "ARC-Challenge", "ARC-Challenge"),
    )
)
BBH = Benchmark(
    name="bbh",
    title="BBH",
    category="Logic Reasoning",
    questions=tuple(
        Source(
            repo="SaylorTwift/bbh",
            subset=task,
            split="test",
            folder="bbh",
            files=(f"bbh/{task}", f"bbh/bbh/{task}"),
            part=task,
        )
        for task in BBH_TASKS
    ),
    read=read_bbh,
    shots=read_bbh_examples,
    shots_by_group=True,
    instruction='Think step by step, and end with "the answer is" and the answer.',
    grading="exact",
    stop=("\nQ:", "\n\n"),
    max_new_tokens=1024,
)
MUSR = Benchmark(
    name="musr",
    title="MuSR",
    category="Logic Reasoning",
    questions=tuple(
        Source(
            repo="TAUR-Lab/MuSR",
            split=split,
            folder="musr",
            files=(f"musr/{file}", f"musr_small/small_{file}"),
            part=split,
            records=musr_questions,
        )
        for split, file in (
            ("murder_mysteries", "murder_mystery"),
            ("object_placements", "object_placements"),
            ("team_allocation", "team_allocation"),
        )
    ),
    read=read_musr,
    shots=(),
    metric="likelihood",
    length_normalised=True,
)
