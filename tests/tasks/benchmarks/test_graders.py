"""Every benchmark's answers have a grader that takes its gold answer and refuses another."""

from __future__ import annotations

import importlib.util

import pytest
from tests.tasks.benchmarks.records import HUB

from rlprior.config import RunError, UsageError
from rlprior.tasks.benchmarks.benchmark import Benchmark
from rlprior.tasks.benchmarks.graders import open_grader
from rlprior.tasks.benchmarks.instructions import InstructionVerifier, read_ifeval
from rlprior.tasks.benchmarks.sources import Record
from rlprior.tasks.benchmarks.suites import BENCHMARKS
from rlprior.tasks.problem import Problem, Status, Verdict

RIGHT, WRONG, CUT = Status.CORRECT, Status.WRONG, Status.TRUNCATED


def first(name: str) -> tuple[Benchmark, Problem]:
    benchmark = BENCHMARKS[name]
    source = benchmark.questions[0]
    [row, *_] = HUB[source.repo][source.subset, source.split]
    return benchmark, benchmark.read(Record(row, "record", source.part))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("gsm8k", "999 and 1 are 1000.\n#### 1,000", "#### 1001"),
        ("amc23", r"So it is \boxed{27}.", r"\boxed{27.5}"),
        ("aime24", r"\boxed{204}", r"\boxed{240}"),
        ("mmlu", "It divides. The answer is (B).", "The answer is (C)."),
        ("mmlu_pro", "The answer is (C).", "The answer is (J)."),
        ("triviaqa", " author 4", " Author 5"),
        ("nq_open", " P. 0", " P. 1"),
        ("bbh", "So the answer is (A).", "So the answer is (B)."),
    ],
)
def test_right_and_wrong_answers(name: str, right: str, wrong: str) -> None:
    benchmark, problem = first(name)
    with open_grader(benchmark) as grader:
        verdicts = grader.grade([(problem, text, False) for text in (right, wrong, problem.solution)])
    assert [verdict.status for verdict in verdicts] == [RIGHT, WRONG, RIGHT]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
@pytest.mark.parametrize("name", ["math", "math500", "minerva", "olympiadbench"])
def test_mathematics_is_compared_as_mathematics(name: str) -> None:
    benchmark, problem = first(name)
    equal = {
        "math": "2.50",
        "math500": r"3+\frac{1}{2}",
        "minerva": r"4.5 \times 10^{33}",
        "olympiadbench": r"2^{-1}",
    }
    texts = [rf"\boxed{{{equal[name]}}}", r"\boxed{11}", problem.solution]
    with open_grader(benchmark, num_workers=1) as grader:
        verdicts = grader.grade([(problem, text, False) for text in texts])
    assert [verdict.status for verdict in verdicts] == [RIGHT, WRONG, RIGHT]


@pytest.mark.parametrize("name", ["humaneval", "humanevalplus", "mbpp", "mbppplus"])
def test_programs_are_run(name: str) -> None:
    benchmark, problem = first(name)
    right = problem.solution.removesuffix("\n[DONE]")
    wrong = right.replace("2 * x", "3 * x").replace("x + 11", "x + 12")
    with open_grader(benchmark, num_workers=1) as grader:
        verdicts = grader.grade([(problem, text, False) for text in (right, wrong)])
    assert [verdict.status for verdict in verdicts] == [RIGHT, WRONG]


def test_likelihood_has_nothing_to_grade() -> None:
    with (
        pytest.raises(UsageError, match="piqa is scored by likelihood; it has no sampled answers"),
        open_grader(BENCHMARKS["piqa"]),
    ):
        pass


def instructed(*instructions: tuple[str, dict[str, object]]) -> Problem:
    fields = {
        "prompt": "Write about tea.",
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [{"unused": None, **arguments} for _, arguments in instructions],
    }
    return read_ifeval(Record(fields, "record"))


@pytest.fixture(scope="module")
def verifier() -> InstructionVerifier:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    return InstructionVerifier()


@pytest.mark.parametrize(
    ("problem", "response", "strict", "loose"),
    [
        (instructed(("punctuation:no_comma", {})), "Tea is warm.", RIGHT, RIGHT),
        (instructed(("punctuation:no_comma", {})), "Tea, I think, is warm.", WRONG, WRONG),
        # the first line is none of the answer's
        (instructed(("punctuation:no_comma", {})), "Sure, here it is:\nTea is warm.", WRONG, RIGHT),
        (
            instructed(("length_constraints:number_words", {"num_words": 3, "relation": "at least"})),
            "Tea is warm.",
            RIGHT,
            RIGHT,
        ),
        (
            instructed(("length_constraints:number_words", {"num_words": 3, "relation": "less than"})),
            "Tea is warm.",
            WRONG,
            WRONG,
        ),
        (
            instructed(("keywords:forbidden_words", {"forbidden_words": ["warm"]})),
            "Tea is warm.",
            WRONG,
            WRONG,
        ),
        (instructed(("detectable_format:json_format", {})), '{"tea": "warm"}', RIGHT, RIGHT),
        # all of several, and not some
        (
            instructed(("punctuation:no_comma", {}), ("detectable_format:json_format", {})),
            "Tea is warm.",
            WRONG,
            WRONG,
        ),
        (instructed(("punctuation:no_comma", {})), " \n", WRONG, WRONG),
        (
            instructed(("language:response_language", {"language": "de"})),
            "Tee wärmt und tut allen gut.",
            RIGHT,
            RIGHT,
        ),
    ],
)
def test_strict_and_loose(
    verifier: InstructionVerifier, problem: Problem, response: str, strict: Status, loose: Status
) -> None:
    assert verifier.grade([(problem, response, False)]) == [Verdict(strict, None, second_status=loose)]


def test_a_response_that_was_cut(verifier: InstructionVerifier) -> None:
    problem = instructed(("detectable_format:json_format", {}))
    assert [one.status for one in verifier.grade([(problem, '{"tea": ', True), (problem, "{}", True)])] == [
        CUT,
        RIGHT,
    ]


def test_chance_is_left_as_it_was(verifier: InstructionVerifier) -> None:
    import random

    state = random.getstate()
    verifier.grade([(instructed(("keywords:letter_frequency", {})), "Tea.", False)])
    assert random.getstate() == state


def test_unknown_instructions_are_named(verifier: InstructionVerifier) -> None:
    with pytest.raises(RunError, match="unknown instruction 'poetry:rhyme'"):
        verifier.grade([(instructed(("poetry:rhyme", {})), "Tea.", False)])


def test_missing_data_of_nltk_are_one_line(
    verifier: InstructionVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    problem = instructed(
        ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "at least"})
    )
    with pytest.raises(RunError, match=r"python -m nltk\.downloader punkt_tab"):
        verifier.grade([(problem, "TEA is warm.", False)])


def test_missing_checkers_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(UsageError, match=r"pip install 'rlprior\[harness\]'"):
        InstructionVerifier()
