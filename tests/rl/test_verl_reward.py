"""The reward file by itself grades as the verifier does."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.tasks.test_verify import TABLE

from rlprior.rl.verl_reward import reward_source
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
    gold, response = json.loads(line)
    print(json.dumps(module.compute_score(data_source="t", solution_str=response, ground_truth=gold, extra_info={})))
assert not [name for name in sys.modules if name.split(".")[0] in ("rlprior", "torch", "numpy")]
"""


def scores_outside(reward: Path, cases: Sequence[tuple[str, str]]) -> list[dict[str, float]]:
    """Scores by the file alone, loaded as verl loads it, in a Python that sees the standard library and nothing else."""
    lines = "".join(json.dumps(case) + "\n" for case in cases)
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
)
GOLDS = ("85", "-85", "1200", "0.5", "1/2", "yes", "x", "0")


def random_responses(count: int) -> list[tuple[str, str]]:
    """Gold answers, and responses put together from what responses are made of."""
    draw = random.Random(0)
    return [
        (draw.choice(GOLDS), "".join(draw.choices(MARKS + VALUES, k=draw.randint(0, 9))))
        for _ in range(count)
    ]


def test_the_reward_file_alone_grades_as_the_verifier_does(reward: Path) -> None:
    hostile = [
        ("1", "{" * 100_000),
        ("1", "#### " + "9" * 1_000_000),
        ("1", r"\boxed{" * 1000 + "1" + "}" * 1000),
    ]
    cases = [(gold, response) for gold, response, *_ in TABLE] + random_responses(3000) + hostile
    counts = dict.fromkeys(Status, 0)
    for (gold, response), score in zip(cases, scores_outside(reward, cases), strict=True):
        problem = Problem(id="", task="t", difficulty=1, prompt="", solution="", answer=gold)
        status = verify(problem, response).status
        counts[status] += 1
        value = float(status is Status.CORRECT)
        expected = {"score": value, "acc": value, "unparsable": float(status is Status.UNPARSABLE)}
        assert score == expected, (gold, response)
    assert min(counts[Status.CORRECT], counts[Status.WRONG], counts[Status.UNPARSABLE]) > 50


def test_gold_solutions_are_rewarded(reward: Path) -> None:
    problems = generate_problems(
        families=tuple(SPACES), difficulties=(1, 2, 3, 4), num_problems=280, split="train", seed=0
    )
    scores = scores_outside(reward, [(problem.answer, problem.solution) for problem in problems])
    assert {score["score"] for score in scores} == {1.0}


def test_the_file_is_read_by_the_oldest_python_that_verl_runs_on() -> None:
    ast.parse(reward_source(), feature_version=(3, 10))
