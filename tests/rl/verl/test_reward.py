"""The reward file by itself grades as the verifier does."""

from __future__ import annotations

import ast
import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.tasks.test_verify import CHOICE_TABLE, CHOICES, TABLE, problem

from rlprior.rl.verl.reward import reward_source
from rlprior.tasks.problem import Problem, Status
from rlprior.tasks.synthetic import SPACES, generate_problems
from rlprior.tasks.verify import verify


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verl") / "reward.py"
    path.write_text(reward_source(), encoding="utf-8")
    return path


GRADE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("custom_module_1", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for line in sys.stdin:
    gold, choices, response = json.loads(line)
    row = {"index": 0, "choices": choices, "num_turns": 2}
    print(json.dumps(module.compute_score(data_source="t", solution_str=response, ground_truth=gold, extra_info=row)))
assert not [name for name in sys.modules if name.split(".")[0] in ("rlprior", "torch", "numpy")]
"""


def scores_outside(reward: Path, cases: Sequence[tuple[Problem, str]]) -> list[dict[str, float]]:
    """Scores by the file alone, loaded as verl loads it, in a Python that sees the standard library and nothing else."""
    lines = "".join(json.dumps([one.answer, one.choices, response]) + "\n" for one, response in cases)
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", GRADE, str(reward)],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


MARKS = (
    "#### ",
    "the answer is ",
    r"\boxed{",
    "}",
    "{",
    r"\frac{1}{2}",
    r"\frac12",
    "$",
    "\n",
    ". ",
    "=",
    "x = ",
)
VALUES = (
    "85",
    "-85",
    "1,200",
    "0.5",
    "1/2",
    "2/4",
    " apples",
    "%",
    "−",
    " or ",
    "**",
    r"\text{yes}",
    "\x00",
    "é",
    "A",
    "(B) ",
)
GOLDS = ("85", "-85", "1200", "0.5", "1/2", "yes", "x", "0")


def random_cases(count: int) -> list[tuple[Problem, str]]:
    """Problems, a quarter of them multiple-choice, and responses put together from what responses are made of."""
    draw = random.Random(0)
    cases: list[tuple[Problem, str]] = []
    for number in range(count):
        posed = problem(draw.choice(GOLDS))
        if number % 4 == 0:
            posed = dataclasses.replace(posed, answer=draw.choice("AB"), choices=("85", "yes"))
        response = "".join(draw.choices(MARKS + VALUES, k=draw.randint(0, 9)))
        cases.append((posed, response))
    return cases


def test_the_reward_file_alone_grades_as_the_verifier_does(reward: Path) -> None:
    cases = [(problem(gold), response) for gold, response, *_ in TABLE] + random_cases(4000)
    cases += [(dataclasses.replace(problem("B"), choices=CHOICES), response) for response, _ in CHOICE_TABLE]
    hostile = ("{" * 100_000, "#### " + "9" * 1_000_000, r"\boxed{" * 1000 + "1" + "}" * 1000)
    cases += [(problem("1"), response) for response in hostile]
    counts = dict.fromkeys(Status, 0)
    for (posed, response), score in zip(cases, scores_outside(reward, cases), strict=True):
        verdict = verify(posed, response)
        counts[verdict.status] += 1
        expected = {
            "score": verdict.reward,
            "acc": verdict.reward,
            "unparsable": float(verdict.status is Status.UNPARSABLE),
        }
        assert score == expected, (posed, response)
    assert min(counts[Status.CORRECT], counts[Status.WRONG], counts[Status.UNPARSABLE]) > 50


def test_gold_solutions_are_rewarded(reward: Path) -> None:
    problems = generate_problems(
        families=tuple(SPACES), difficulties=(1, 2, 3, 4), num_problems=280, split="train", seed=0
    )
    scores = scores_outside(reward, [(posed, posed.solution) for posed in problems])
    assert {score["score"] for score in scores} == {1.0}


def test_the_file_is_read_by_the_oldest_python_that_verl_runs_on() -> None:
    ast.parse(reward_source(), feature_version=(3, 10))
