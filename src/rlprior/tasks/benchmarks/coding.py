"""Coding: HumanEval and MBPP, and both with EvalPlus's further tests."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlprior.tasks.benchmarks.benchmark import Benchmark
from rlprior.tasks.benchmarks.sources import Record, Source
from rlprior.tasks.code.problems import humaneval_reference, mbpp_reference
from rlprior.tasks.code.values import encode
from rlprior.tasks.problem import Problem

Row = Mapping[str, Any]
_LINK = re.compile(r"https?://\S+")


def read_humaneval(record: Record) -> Problem:
    """`prompt` (the head of a function), `entry_point`, `canonical_solution` and `test`, or EvalPlus's `base_input`."""
    prompt, code = record["prompt"], record["canonical_solution"]
    further = _plus_inputs(record)
    row = record.fields if further is None else _as_released(record, {}, further)
    reference = humaneval_reference(row) | _encoded(further)
    return _problem(prompt, code, code, reference)


def read_mbpp(record: Record) -> Problem:
    """`task_id`, `text`, `code` and `test_list`: the prompt shows all tests."""
    return _read_mbpp(record, num_tests=None)


def read_mbppplus(record: Record) -> Problem:
    """EvalPlus's own record (`base_input`), its copy on the hub (`test`), or for an example MBPP's: the prompt shows the first test."""
    return _read_mbpp(record, num_tests=1)


def _read_mbpp(record: Record, num_tests: int | None) -> Problem:
    with warnings.catch_warnings():  # programs of the data set whose patterns are no raw strings
        warnings.simplefilter("ignore")
        reference = mbpp_reference(record.fields)
    if "base_input" in record.fields:
        lines = record.text("prompt").strip('"').strip().splitlines()
        tests = [line for line in lines if line.startswith("assert ")]
        text = "\n".join(line for line in lines if not line.startswith("assert "))
        code = record.text("canonical_solution")
    else:
        text, tests, code = record.text("text", "prompt"), record["test_list"], record.text("code")
        further = _plus_inputs(record)
        if further is not None:
            known = {"entry_point": reference["entry_point"], "canonical_solution": code}
            reference = mbpp_reference(_as_released(record, known, further)) | _encoded(further)
    shown = "\n".join(tests[:num_tests])
    task = " ".join(_LINK.sub("", text).split())
    prompt = f"Task: {task}\nThe code must pass:\n{shown}\n[BEGIN]\n"
    worked = "\n".join(code.splitlines())
    return _problem(prompt, f"{worked}\n[DONE]", worked, reference)


def _problem(prompt: str, solution: str, code: str, reference: dict[str, Any]) -> Problem:
    return Problem(
        id="", task="", difficulty=0, prompt=prompt, solution=solution, answer=code, reference=reference
    )


def _plus_inputs(record: Record) -> tuple[list[Any], float] | None:
    """Inputs and tolerance of EvalPlus's test on the hub, which loops over `inputs`; None of a record that has no such test."""
    if "base_input" in record.fields or not isinstance(record.fields.get("test"), str):
        return None
    module = ast.parse(record["test"]).body
    checks = [node for node in module if isinstance(node, ast.FunctionDef) and node.name == "check"]
    statements = checks[0].body if checks else module
    assigned = {
        node.targets[0].id: node.value
        for node in statements
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    loop = next((node for node in statements if isinstance(node, ast.For)), None)
    if loop is None or "inputs" not in assigned:
        return None
    # assertion(actual, expected, tolerance), or assert a residual <= tolerance
    tolerance = next(
        node.value
        for node in reversed([*ast.walk(loop)])
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float)
    )
    inputs = ast.literal_eval(_Infinities().visit(assigned["inputs"]))
    return [list(arguments) for arguments in inputs], tolerance


class _Infinities(ast.NodeTransformer):
    """The names `inf` and `nan` as the numbers that they are in EvalPlus's tests."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"inf": math.inf, "nan": math.nan}
        return ast.Constant(values[node.id]) if node.id in values else node


def _as_released(record: Record, known: dict[str, Any], further: tuple[list[Any], float]) -> dict[str, Any]:
    """The record as EvalPlus's own files have it, but for the inputs."""
    number = str(record["task_id"]).rpartition("/")[2]
    return {
        **record.fields,
        **known,
        "task_id": f"Task/{number}",
        "base_input": [],
        "plus_input": [],
        "atol": further[1],
    }


def _encoded(further: tuple[list[Any], float] | None) -> dict[str, Any]:
    return {} if further is None else {"inputs": [encode(arguments) for arguments in further[0]]}


def _tasks(is_wanted: Callable[[int], bool]) -> Callable[[Row], Iterable[Row]]:
    """Rows of MBPP whose number is wanted: its one file holds the splits that the hub has apart."""
    return lambda row: (row,) if is_wanted(int(row["task_id"])) else ()


def _mbpp(split: str, is_wanted: Callable[[int], bool]) -> Source:
    return Source(
        repo="google-research-datasets/mbpp",
        subset="full",
        split=split,
        folder="mbpp",
        files=("mbpp/mbpp",),
        records=_tasks(is_wanted),
    )


_FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

HUMANEVAL = Benchmark(
    name="humaneval",
    title="HumanEval",
    category="Coding",
    questions=(
        Source(
            repo="openai/openai_humaneval",
            split="test",
            folder="humaneval",
            files=("humaneval/HumanEval", "humaneval/openai_humaneval/test"),
        ),
    ),
    read=read_humaneval,
    shots=(),
    grading="code",
    stop=_FUNCTION_ENDS,
    max_new_tokens=1024,
)
HUMANEVALPLUS = Benchmark(
    name="humanevalplus",
    title="HumanEval+",
    category="Coding",
    questions=(
        Source(
            repo="evalplus/humanevalplus",
            split="test",
            folder="humanevalplus",
            files=("humanevalplus/HumanEvalPlus",),
        ),
    ),
    read=read_humaneval,
    shots=(),
    grading="code",
    stop=_FUNCTION_ENDS,
    max_new_tokens=1024,
)
MBPP = Benchmark(
    name="mbpp",
    title="MBPP",
    category="Coding",
    questions=(_mbpp("test", lambda number: 11 <= number <= 510),),
    read=read_mbpp,
    shots=(_mbpp("prompt", lambda number: number in (2, 3, 4)),),
    grading="code",
    stop=("[DONE]",),
    max_new_tokens=1024,
)
MBPPPLUS = Benchmark(
    name="mbppplus",
    title="MBPP+",
    category="Coding",
    questions=(
        Source(repo="evalplus/mbppplus", split="test", folder="mbppplus", files=("mbppplus/MbppPlus",)),
    ),
    read=read_mbppplus,
    # of MBPP's ten example tasks, those that MBPP+ does not ask
    shots=(_mbpp("prompt", lambda number: number in (1, 5, 10)),),
    grading="code",
    stop=("[DONE]",),
    max_new_tokens=1024,
)
