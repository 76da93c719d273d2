"""Programs in responses: which are found, what they count as, and that none is counted as correct without being it."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tasks.code.attacks import FIND_SECRET, FORGERIES, Forgery, forge_result

from rlprior.config import RunError
from rlprior.tasks.code.grader import CodeVerifier, open_code_verifier, program_sources
from rlprior.tasks.code.problems import humaneval_reference, mbpp_reference
from rlprior.tasks.code.sandbox import Request
from rlprior.tasks.problem import Problem, Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is the Linux kernel's")

PROMPT = 'import math\n\n\ndef root(x):\n    """ The square root of x. """\n'
BODY = "    return math.sqrt(x)\n"
ROOT: dict[str, Any] = {
    "task_id": "HumanEval/999",
    "entry_point": "root",
    "prompt": PROMPT,
    "canonical_solution": BODY,
    "base_input": [[4], [2]],
    "plus_input": [[0.5]],
    "atol": 0,
}
SECRETS = (3 << 98, 5 << 97)


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    with open_code_verifier(num_workers=2) as verifier:
        yield verifier


def problem(reference: dict[str, Any], name: str = "one") -> Problem:
    return Problem(id=name, task="code", difficulty=0, prompt="", solution="", answer="", reference=reference)


def secret_problem(secret: int) -> Problem:
    check = (
        f"def check(candidate):\n    assert candidate(0) == {secret}\n    assert candidate(1) == {secret}\n"
    )
    return problem(humaneval_reference({"entry_point": "attack", "prompt": "", "test": check}))


def status(verifier: CodeVerifier, asked: Problem, text: str, *, truncated: bool = False) -> Status:
    return verifier.grade([(asked, text, truncated)])[0].status


RESPONSES = [
    ("continuation", BODY, Status.CORRECT),
    ("continuation and prose", f"{BODY}\nThis returns the root.\n", Status.CORRECT),
    ("continuation and a wrong assertion", f"{BODY}\nassert root(4) == 3\n", Status.CORRECT),
    (
        "continuation and another function",
        "    return half(x)\n\ndef half(x):\n    return x ** 0.5\n",
        Status.CORRECT,
    ),
    ("continuation and an unfinished function", f"{BODY}\ndef other(x):\n    return (", Status.CORRECT),
    ("a block", f"Here:\n```python\ndef root(x):\n{BODY}```\nDone.", Status.CORRECT),
    ("a block with the body alone", f"```python\n{BODY}```", Status.CORRECT),
    ("a block without a language", f"```\ndef root(x):\n{BODY}```", Status.CORRECT),
    ("a block that is not closed", f"```py\ndef root(x):\n{BODY}", Status.CORRECT),
    (
        "the last of two blocks",
        f"```python\ndef root(x):\n    return 0\n```\n```python\ndef root(x):\n{BODY}```",
        Status.CORRECT,
    ),
    (
        "a block, then its use",
        f"```python\ndef root(x):\n{BODY}```\n```python\nprint(root(4))\n```",
        Status.CORRECT,
    ),
    ("from inside a block", f"{BODY}```\nIt returns the root.", Status.CORRECT),
    ("a program", f"def root(x):\n{BODY}", Status.CORRECT),
    ("an assignment", "root = lambda x: x ** 0.5\n", Status.CORRECT),
    ("within the tolerance", "    return math.sqrt(x) + 1e-9\n", Status.CORRECT),
    ("beyond the tolerance", "    return math.sqrt(x) + 1e-5\n", Status.WRONG),
    ("another type", "    return str(math.sqrt(x))\n", Status.WRONG),
    ("no return", "    math.sqrt(x)\n", Status.WRONG),
    ("right for some", "    return 2.0\n", Status.WRONG),
    ("an exception", "    return 1 / 0\n", Status.WRONG),
    ("too many arguments", "def root(x, y):\n    return x\n", Status.WRONG),
    ("nothing", "", Status.UNPARSABLE),
    ("blank", "\n\n", Status.UNPARSABLE),
    ("prose", "I cannot do that.", Status.UNPARSABLE),
    ("prose in a block", "```python\nI cannot do that.\n```", Status.UNPARSABLE),
    ("another function", "def square(x):\n    return x * x\n", Status.UNPARSABLE),
    ("a null character", "    return '\0'\n", Status.UNPARSABLE),
    ("half of a pair of surrogates", "    return '\ud800'\n", Status.UNPARSABLE),
]


def test_what_each_response_counts_as(verifier: CodeVerifier) -> None:
    asked = problem(humaneval_reference(ROOT))
    verdicts = verifier.grade([(asked, text, False) for _, text, _ in RESPONSES])
    found = {name: verdict.status for (name, _, _), verdict in zip(RESPONSES, verdicts, strict=True)}
    assert found == {name: expected for name, _, expected in RESPONSES}


def test_a_response_that_was_cut_is_truncated_unless_it_is_correct(verifier: CodeVerifier) -> None:
    asked = problem(humaneval_reference(ROOT))
    assert status(verifier, asked, "    return math.sq", truncated=True) is Status.TRUNCATED
    assert status(verifier, asked, "    return (x", truncated=True) is Status.TRUNCATED
    assert status(verifier, asked, f"{BODY}\ndef other(", truncated=True) is Status.CORRECT


def test_programs_that_behave_alike_vote_alike(verifier: CodeVerifier) -> None:
    asked = problem(humaneval_reference(ROOT))
    bodies = [
        "    return 1\n",
        "    return 1.0\n",
        "    return 2\n",
        "    return object()\n",
        "    return 1/0\n",
    ]
    one, same, other, no_value, raised = (
        verdict.extracted for verdict in verifier.grade([(asked, body, False) for body in bodies])
    )
    assert one == same != other
    assert one is not None
    assert other is not None
    assert no_value is None is raised


def test_equal_outputs_with_two_verdicts_are_two_votes(verifier: CodeVerifier) -> None:
    nearly_3 = {"canonical_solution": "    return x - 1e-9\n", "base_input": [[3]], "plus_input": []}
    asked = problem(humaneval_reference({**ROOT, **nearly_3}))
    number, integer = verifier.grade([(asked, f"    return {text}\n", False) for text in ("3.0", "3")])
    assert (number.status, integer.status) == (Status.CORRECT, Status.WRONG)
    assert number.extracted != integer.extracted  # one answer with both verdicts would end the evaluation


def test_identical_programs_run_once(verifier: CodeVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Request] = []
    run = verifier._sandbox.run
    monkeypatch.setattr(verifier._sandbox, "run", lambda request: ran.append(request) or run(request))
    asked = problem(humaneval_reference({**ROOT, "base_input": [[9]]}))
    verifier.grade([(asked, BODY, False)] * 5 + [(asked, "    return 0\n", False)] * 3)
    assert len(ran) == 3  # the reference solution and two programs
    verifier.grade([(asked, BODY, False)])
    assert len(ran) == 4  # the reference solution is known


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.name)
def test_no_forged_result_is_correct(forgery: Forgery, verifier: CodeVerifier) -> None:
    assert status(verifier, secret_problem(SECRETS[0]), forgery.program) in (Status.WRONG, Status.FAILED)


def test_a_forger_who_knows_the_answer_may_as_well_return_it(verifier: CodeVerifier) -> None:
    """The control: what these programs write is read, and only what they do not know keeps them from being correct."""
    secret = SECRETS[0]
    honest = f"def attack(x): return {secret}\n"
    assert status(verifier, secret_problem(secret), honest) is Status.CORRECT
    assert status(verifier, secret_problem(secret), forge_result([secret, secret])) is Status.CORRECT
    assert status(verifier, secret_problem(SECRETS[1]), honest) is Status.WRONG


def test_a_test_that_runs_beside_the_program_can_be_read_by_it(verifier: CodeVerifier) -> None:
    """The weaker guarantee of tests that are more than calls: a program without a result is not correct, a spy is."""
    check = f"def check(candidate):\n    for x in range(3):\n        assert candidate(x) == {SECRETS[0]}\n"
    reference = humaneval_reference({"entry_point": "attack", "prompt": "", "test": check})
    assert "test" in reference
    asked = problem(reference)
    assert status(verifier, asked, f"def attack(x): return {SECRETS[0]}\n") is Status.CORRECT
    assert status(verifier, asked, "def attack(x): return 0\n") is Status.WRONG
    assert status(verifier, asked, "import sys\ndef attack(x): sys.exit(0)\n") is Status.WRONG
    assert status(verifier, asked, forge_result([True])) is Status.WRONG
    spy = FIND_SECRET.replace(
        "gc.get_objects()", "[f.__code__.co_consts for f in gc.get_objects() if hasattr(f, '__code__')]"
    )
    assert status(verifier, asked, spy) is Status.CORRECT


def test_a_reference_that_does_not_run_is_told(verifier: CodeVerifier) -> None:
    broken = problem(
        humaneval_reference({**ROOT, "canonical_solution": "    return 1 / 0\n"}), "HumanEval/999"
    )
    with pytest.raises(
        RunError, match="reference solution of HumanEval/999 does not run: raised ZeroDivisionError"
    ):
        verifier.grade([(broken, BODY, False)])


def test_sources_keep_the_prompt_before_a_block() -> None:
    assert program_sources("```python\nx\n```", "def f():") == (
        ("def f():\n", "x\n"),
        ("def f():", "```python\nx\n```"),
    )


def mbpp_problem(**fields: Any) -> Problem:
    record = {"task_id": 1, "text": "", "code": "def f(x):\n    return x", "test_setup_code": "", **fields}
    return problem(mbpp_reference(record))


def test_assertions_become_calls_and_expected_values() -> None:
    record = mbpp_problem(test_list=["assert f((1, 2)) == [1.5]", "assert f(-1) == {'a': None}"]).reference
    assert record["inputs"] == [[{"tuple": [1, 2]}], [-1]]
    assert record["expected"] == [[1.5], {"dict": [["a", None]]}]
    other = mbpp_problem(test_list=["assert f(1) == 1", "assert set(f(2)) == {2}"]).reference
    assert other["test"] == "\nassert f(1) == 1\nassert set(f(2)) == {2}\n"
    assert other["entry_point"] == "f"


def test_a_test_list_with_code_of_its_own(verifier: CodeVerifier) -> None:
    asked = mbpp_problem(
        code="class Node: pass\ndef f(x):\n    return x.value",
        test_setup_code="node = Node()\nnode.value = 5",
        test_list=["assert f(node) == 5"],
    )
    program = "class Node: pass\ndef f(x):\n    return {}\n"
    assert status(verifier, asked, program.format("x.value")) is Status.CORRECT
    assert status(verifier, asked, program.format("6")) is Status.WRONG


def read_gzipped(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def grade_solutions(
    records: list[dict[str, Any]], read: Callable[[dict[str, Any]], dict[str, Any]], num_workers: int = 1
) -> dict[str, Status]:
    """What the records' own solutions count as."""
    asked = [problem(read(record), str(record["task_id"])) for record in records]
    responses = [
        (one, record.get("canonical_solution") or record["code"], False)
        for one, record in zip(asked, records, strict=True)
    ]
    with open_code_verifier(num_workers=num_workers) as verifier:
        verdicts = verifier.grade(responses)
    return {one.id: verdict.status for one, verdict in zip(asked, verdicts, strict=True)}


def wrong(statuses: dict[str, Status]) -> dict[str, Status]:
    return {name: status for name, status in statuses.items() if status is not Status.CORRECT}


def test_solutions_of_humaneval_plus_pass_a_few_inputs(real_data: Path) -> None:
    records = read_gzipped(real_data / "humanevalplus" / "HumanEvalPlus-Mini.jsonl.gz")
    assert wrong(grade_solutions(records[:40:2], humaneval_reference, 2)) == {}


@pytest.mark.slow
def test_solutions_of_humaneval_plus_pass(real_data: Path) -> None:
    records = read_gzipped(real_data / "humanevalplus" / "HumanEvalPlus.jsonl.gz")
    assert len(records) == 164
    assert wrong(grade_solutions(records, humaneval_reference)) == {}


@pytest.mark.slow
def test_solutions_of_humaneval_pass(real_data: Path) -> None:
    records = read_gzipped(real_data / "humanevalplus" / "HumanEvalPlus.jsonl.gz")
    plain = [{key: item for key, item in record.items() if not key.endswith("_input")} for record in records]
    assert wrong(grade_solutions(plain, humaneval_reference)) == {}


@pytest.mark.slow
def test_solutions_of_mbpp_plus_pass(real_data: Path) -> None:
    records = read_gzipped(real_data / "mbppplus" / "MbppPlus.jsonl.gz")
    assert len(records) == 378
    assert wrong(grade_solutions(records, mbpp_reference)) == {}


@pytest.mark.slow
def test_solutions_of_mbpp_pass(real_data: Path) -> None:
    with open(real_data / "mbpp" / "mbpp.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    statuses = grade_solutions(records, mbpp_reference)
    assert len(statuses) == 974
    assert wrong(statuses) == {}
