"""The files that are there: every record is read, and its own gold answer is graded correct."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import pytest

from rlprior.tasks.benchmarks.benchmark import load_benchmark
from rlprior.tasks.benchmarks.graders import open_grader
from rlprior.tasks.benchmarks.logic import BBH_TASKS
from rlprior.tasks.benchmarks.suites import BENCHMARKS
from rlprior.tasks.problem import LETTERS, Problem, Status

# name, shots, questions, groups
FILES = [
    ("gsm8k", 4, 1319, 1),
    ("gsm8k", 8, 1319, 1),
    ("mmlu", 4, 14042, 57),
    ("bbh", 3, 6511, 27),
    ("openbookqa", 5, 500, 1),
    ("nq_open", 5, 3605, 1),
    ("musr", 0, 30, 3),
    ("humanevalplus", 0, 164, 1),
    ("mbpp", 3, 500, 1),
    ("mbppplus", 3, 378, 1),
]


@functools.cache
def load(
    data_dir: Path, name: str, num_shots: int = 0, limit: int | None = None, seed: int = 0
) -> list[Problem]:
    benchmark = BENCHMARKS[name]
    return load_benchmark(benchmark, num_shots=num_shots, data_dir=data_dir, limit=limit, seed=seed)


@pytest.mark.parametrize(("name", "num_shots", "num_questions", "num_groups"), FILES)
def test_every_record_is_a_question(
    real_data: Path, name: str, num_shots: int, num_questions: int, num_groups: int
) -> None:
    problems = load(real_data, name, num_shots)
    assert len(problems) == num_questions
    assert len({problem.id for problem in problems}) == num_questions
    assert len({problem.group for problem in problems}) == num_groups
    for problem in problems:
        assert problem.task == name
        assert problem.answer.strip()
        assert problem.prompt.strip()
        if BENCHMARKS[name].metric == "likelihood":
            assert all(choice.startswith(" ") and choice.strip() for choice in problem.choices)
            assert problem.answer in LETTERS[: len(problem.choices)]


def test_bbh_has_all_its_tasks(real_data: Path) -> None:
    counts = Counter(problem.group for problem in load(real_data, "bbh", 3))
    small = {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}
    assert counts == {task: small.get(task, 250) for task in BBH_TASKS}


@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "bbh", "nq_open"])
def test_gold_answers_are_graded_correct_and_others_wrong(real_data: Path, name: str) -> None:
    problems = load(real_data, name)
    others = problems[1:] + problems[:1]
    with open_grader(BENCHMARKS[name]) as grader:
        right = grader.grade([(problem, problem.solution, False) for problem in problems])
        swapped = grader.grade(
            [(problem, other.solution, False) for problem, other in zip(problems, others, strict=True)]
        )
    assert Counter(verdict.status for verdict in right) == {Status.CORRECT: len(problems)}
    for problem, other, verdict in zip(problems, others, swapped, strict=True):
        if problem.answer != other.answer and not problem.reference:
            assert verdict.status is Status.WRONG


def test_prompts_hold_the_shots_and_end_where_the_answer_begins(real_data: Path) -> None:
    gsm8k = load(real_data, "gsm8k", 4)[0].prompt
    assert gsm8k.count("Question: ") == 5
    assert gsm8k.count("\n#### ") == 4
    assert "<<" not in gsm8k
    assert gsm8k.endswith("\nAnswer:")
    for problem in load(real_data, "bbh", 3):
        assert problem.prompt.count("A: Let's think step by step.") == 4
        assert problem.prompt.endswith("A: Let's think step by step.")
        assert "canary" not in problem.prompt
    for problem in load(real_data, "mmlu", 4):
        assert problem.prompt.count("A: Let's think step by step.") == 5
        assert problem.prompt.startswith("The following are multiple choice questions")
    openbookqa = load(real_data, "openbookqa", 5)[0]
    assert openbookqa.prompt.count("\n\n") == 5
    assert openbookqa.choices[1] == " quit eating lunch out"


def test_tasks_of_mbppplus_are_not_among_its_examples(real_data: Path) -> None:
    questions = {problem.prompt for problem in load(real_data, "mbppplus")}
    opening = load(real_data, "mbppplus", 3)[0].prompt
    examples = [f"Task: {text}" for text in opening.split("Task: ")[1:-1]]
    assert len(examples) == 3
    heads = {prompt.split("\n")[0] for prompt in questions}
    assert not heads & {text.split("\n")[0] for text in examples}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [("humanevalplus", "HumanEvalPlus"), ("mbppplus", "MbppPlus")])
def test_evalplus_asks_the_same_calls_in_both_its_layouts(
    real_data: Path, tmp_path: Path, name: str, file: str
) -> None:
    # the hub's layout, under the name of the released one
    hub = tmp_path / name / f"{file}.jsonl.gz"
    hub.parent.mkdir()
    hub.write_bytes((real_data / name / f"{file}-OriginFmt.jsonl.gz").read_bytes())
    different: list[str] = []
    for released, copied in zip(load(real_data, name), load(tmp_path, name), strict=True):
        assert released.id == copied.id
        one, other = ({**problem.reference} for problem in (released, copied))
        inputs = [{str(arguments) for arguments in each.pop("inputs")} for each in (one, other)]
        if inputs[0] != inputs[1]:
            different.append(one["entry_point"])
        assert one.pop("solution").strip() == other.pop("solution").strip()
        assert one == other
    # complex numbers whose zero has lost its sign on the way
    assert different == ([] if name == "humanevalplus" else ["angle_complex", "convert"])


def test_a_smaller_draw_is_the_beginning_of_a_larger_and_even_over_groups(real_data: Path) -> None:
    larger = load(real_data, "bbh", 3, limit=100)
    assert larger[:30] == load(real_data, "bbh", 3, limit=30)
    assert set(Counter(problem.group for problem in larger).values()) == {3, 4}
    everything = {problem.id for problem in load(real_data, "bbh", 3)}
    assert {problem.id for problem in larger} < everything
    assert larger != load(real_data, "bbh", 3, limit=100, seed=1)
    few = [{problem.group for problem in load(real_data, "bbh", 3, limit=5, seed=seed)} for seed in (0, 1)]
    assert len(few[0]) == len(few[1]) == 5
    assert few[0] != few[1]
    assert {problem.id for problem in load(real_data, "bbh", 3, limit=10**6)} == everything
