"""What runs in the sandbox: raise the walls, say which stand, read a program, run it, and write what it returned.

The standard library alone, and nothing that the program must not see: whatever it does in here, it is given inputs and no expected
values. Messages are one JSON object each: the walls on a line, then, up to the end of the stream, the result.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import time
import types
from typing import Any

from rlprior.tasks.code import isolation
from rlprior.tasks.code.values import decode, encode_output

_CHUNK_BYTES = 1 << 16


def main() -> None:
    """Body of the process; its settings are its first argument, the request comes by standard input."""
    settings = json.loads(sys.argv[1])
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    _write(channel, json.dumps(_isolate(settings)) + "\n")
    request = json.loads(sys.stdin.buffer.read())
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    result = json.dumps(_run(request))
    _write(channel, result)
    os._exit(0)


def _isolate(settings: dict[str, Any]) -> dict[str, Any]:
    """Which walls stand, and why not all of them."""
    try:
        isolation.limit_resources(settings["max_memory_bytes"], settings["max_cpu_seconds"])
        isolation.end_with_parent(settings["parent"])
        return {"walls": isolation.raise_walls(settings["readable"]), "problem": ""}
    except (OSError, ValueError, AttributeError) as error:
        return {"walls": [], "problem": f"{type(error).__name__}: {error}"}


def _write(channel: int, text: str) -> None:
    data = memoryview(text.encode())
    while data:
        data = data[os.write(channel, data[:_CHUNK_BYTES]) :]


def _run(request: dict[str, Any]) -> dict[str, Any]:
    tree = choose_program(request["sources"], request["entry_point"])
    if tree is None:
        return {"unparsable": True}
    module = types.ModuleType("program")
    sys.modules["program"] = module
    outputs: list[Any] = []
    try:
        exec(compile(tree, "program.py", "exec"), module.__dict__)
        exec(compile(request["epilogue"], "test.py", "exec"), module.__dict__)
        function = module.__dict__[request["call"]]
        for arguments in request["inputs"]:
            outputs.append(encode_output(function(*decode(arguments))))
    except BaseException as error:  # SystemExit too: it is the program's
        return {"raised": type(error).__name__}
    return {"outputs": outputs, "cpu_seconds": time.process_time()}


def choose_program(sources: list[list[str]], entry_point: str) -> ast.Module | None:
    """The first source that defines the entry point, without its assertions and without statements that do nothing.

    A response that goes on after its program is cut before the first unindented line that is no Python. Assertions that a model
    writes below its function test its own guesses.

    Args:
        sources: (head, body): code that is given and what a response adds to it.
        entry_point: the function that must be defined, and not by the head alone.

    Returns:
        A program that compiles; None where there is none.
    """
    for head, body in sources:
        tree = _parse_longest(head, body)
        if tree is None or not _defines(tree, entry_point, after_line=head.count("\n")):
            continue
        tree.body = [statement for statement in tree.body if not _is_idle(statement)]
        try:
            compile(tree, "program.py", "exec")
        except (SyntaxError, ValueError, RecursionError):
            continue
        return tree
    return None


def _parse_longest(head: str, body: str) -> ast.Module | None:
    lines = [f"{line}\n" for line in body.split("\n")]
    first_line = head.count("\n") + 1
    while lines:
        try:
            return ast.parse(head + "".join(lines))
        except SyntaxError as error:
            last = min(len(lines) - 1, (error.lineno or first_line) - first_line)
        except (ValueError, RecursionError):
            return None
        starts = [number for number in range(last + 1) if lines[number][:1].strip()]
        del lines[starts[-1] if starts else 0 :]
    return None


def _defines(tree: ast.Module, name: str, *, after_line: int) -> bool:
    for statement in tree.body:
        match statement:
            case ast.FunctionDef(name=defined) | ast.ClassDef(name=defined):
                names = [defined]
            case ast.Assign(targets=targets):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            case _:
                continue
        if name in names and (statement.end_lineno or 0) > after_line:
            return True
    return False


def _is_idle(statement: ast.stmt) -> bool:
    is_expression = isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Call)
    return is_expression or isinstance(statement, ast.Assert)


if __name__ == "__main__":
    main()
