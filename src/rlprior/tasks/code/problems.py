"""What the records of HumanEval, MBPP, HumanEval+ and MBPP+ ask of a program, as plain data for `CodeVerifier`.

A reference is a JSON object:

  entry_point  the function that a program must define
  prompt       code that the program continues; empty where it is written from nothing
  inputs       a list of encoded arguments (`rlprior.tasks.code.values`) for each call
  expected     what each call must return, encoded; or else
  solution     a program whose outputs are expected
  comparison   how an output is compared: a key of `rlprior.tasks.code.comparison.COMPARISONS`
  tolerance    absolute, of floating-point outputs; 0 for the default
  test         code to be run after the program, instead of inputs: where a test is more than calls and expected values
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any

from rlprior.config import UsageError
from rlprior.tasks.code.values import encode

_SET_PROBLEMS = {2, 7, 111, 140, 232, 249, 579, 769}
_EXISTENCE_PROBLEMS = {737, 787, 794}
_SPECIAL_PROBLEMS = {558: "digit_distance", 581: "surface_area"}

# The files hold lists where a problem means tuples. A place is (argument, or None for all of them; depths at which lists are tuples).
_TUPLES: dict[tuple[int | None, frozenset[int]], set[int]] = {
    (None, frozenset({0})): {
        *(2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424),
        *(429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809),
    },
    (None, frozenset({1})): {63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780},
    (0, frozenset({1})): {75, 413, 444, 722, 753},
    (1, frozenset({0})): {106, 750},
    (0, frozenset({0})): {250, 307, 405, 446, 617, 720, 763, 808},
    (None, frozenset({0, 1})): {259, 278, 401, 445},
    (None, frozenset(range(100))): {580, 615, 791},
}


def humaneval_reference(record: Mapping[str, Any]) -> dict[str, Any]:
    """The reference of a record of HumanEval+ (which has `base_input`) or HumanEval (`test`).

    Source: the fields of openai/human-eval and evalplus/humanevalplus_release.
    """
    reference = {"entry_point": record["entry_point"], "prompt": record["prompt"]}
    if "base_input" not in record:
        return reference | _read_check(record["test"], record["entry_point"])
    return reference | {
        "inputs": [encode(arguments) for arguments in _all_inputs(record)],
        "solution": record["prompt"] + record["canonical_solution"],
        "comparison": "root" if record["entry_point"] == "find_zero" else "equal",
        "tolerance": record["atol"],
    }


def mbpp_reference(record: Mapping[str, Any]) -> dict[str, Any]:
    """The reference of a record of MBPP+ (which has `base_input`) or MBPP (`test_list`).

    Source: the fields of google-research/mbpp and evalplus/mbppplus_release, whose lists stand for tuples, sets and complex numbers
    in some problems; evalplus compares the outputs of some of them in ways of their own.

    Raises:
        UsageError: the tests call none of the solution's functions.
    """
    if "base_input" not in record:
        return _read_test_list(record)
    number = int(record["task_id"].rpartition("/")[2])
    comparison = _SPECIAL_PROBLEMS.get(number, "equal")
    comparison = "set" if number in _SET_PROBLEMS else comparison
    comparison = "existence" if number in _EXISTENCE_PROBLEMS else comparison
    return {
        "entry_point": record["entry_point"],
        "prompt": "",
        "inputs": [encode(_restore_types(number, arguments)) for arguments in _all_inputs(record)],
        "solution": record["canonical_solution"],
        "comparison": comparison,
        "tolerance": record["atol"],
    }


def _all_inputs(record: Mapping[str, Any]) -> list[list[Any]]:
    # a problem without further inputs has an empty object for them
    return [*record["base_input"], *record["plus_input"]]


def _restore_types(number: int, arguments: list[Any]) -> list[Any]:
    if number == 115:  # an empty list stands for {}, which is a dictionary
        return [[set(item) if isinstance(item, list) and item else {} for item in arguments[0]]]
    if number == 124:
        return [float(arguments[0]), complex(arguments[1])]
    if number == 252:
        return [complex(arguments[0])]
    for (place, depths), numbers in _TUPLES.items():
        if number in numbers:
            return [
                _with_tuples(argument, depths) if place in (None, index) else argument
                for index, argument in enumerate(arguments)
            ]
    return arguments


def _with_tuples(value: Any, depths: frozenset[int], depth: int = 0) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item, depths, depth + 1) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    items = [_with_tuples(item, depths, depth + 1) for item in value]
    return tuple(items) if depth in depths else items


def _parse(code: str) -> list[ast.stmt]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escape sequences that mean nothing
        return ast.parse(code).body


def _read_check(test: str, entry_point: str) -> dict[str, Any]:
    """Of a test that defines `check(candidate)`."""
    functions = [node for node in _parse(test) if isinstance(node, ast.FunctionDef)]
    cases = _read_cases(functions[0].body, "candidate") if len(functions) == 1 else None
    return cases or {"test": f"{test}\ncheck({entry_point})\n"}


def _read_test_list(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of lines of assertions, and the code that sets them up."""
    set_up = "\n".join([*record.get("test_imports", ()), record.get("test_setup_code", "")]).strip()
    test = "\n".join(record["test_list"])
    body = _parse(test)
    defined = {node.name for node in _parse(record["code"]) if isinstance(node, ast.FunctionDef)}
    called = [
        node.func.id
        for node in ast.walk(body[0])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    entry_point = next((name for name in called if name in defined), None)
    if entry_point is None:
        raise UsageError(
            f"problem {record['task_id']}: its first test calls no function that its code defines; give records of MBPP"
        )
    cases = None if record.get("test_setup_code") else _read_cases(body, entry_point)
    return {"entry_point": entry_point, "prompt": ""} | (cases or {"test": f"{set_up}\n{test}\n"})


def _read_cases(body: list[ast.stmt], function: str) -> dict[str, Any] | None:
    """The inputs and expected values of assertions, None where one of them says more than that a call returns a literal."""
    pairs: list[tuple[Any, Any]] = []
    for statement in body:
        if not isinstance(statement, ast.Assert):
            return None
        if isinstance(statement.test, ast.Constant) and statement.test.value is True:
            continue
        pair = _read_case(statement.test, function)
        if pair is None:
            return None
        pairs.append(pair)
    return {
        "inputs": [encode(arguments) for arguments, _ in pairs],
        "expected": [encode(expected) for _, expected in pairs],
        "comparison": "exact",
        "tolerance": 0,
    }


def _read_case(test: ast.expr, function: str) -> tuple[list[Any], Any] | None:
    match test:
        case ast.Compare(
            left=ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]),
            ops=[ast.Eq()],
            comparators=[value],
        ) if name == function:
            try:
                return [ast.literal_eval(argument) for argument in arguments], ast.literal_eval(value)
            except ValueError:
                return None
    return None
