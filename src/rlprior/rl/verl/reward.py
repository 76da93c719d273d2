"""The reward function that verl calls, and its source as one file: verl's environment has none of ours."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlprior.tasks.canonical import canonical_answer
from rlprior.tasks.verify import find_answer


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    **_: object,
) -> dict[str, float]:
    """Reward of one response as verl asks for it: 1 where the final answer is the gold answer, else 0.

    Args:
        data_source: not read.
        solution_str: text of the response, special tokens left out.
        ground_truth: the gold answer; of a multiple-choice question its letter.
        extra_info: of the problem's row; `choices` of a multiple-choice question.

    Returns:
        `score`, the reward; `acc`, the same, by which verl drops groups of equal rewards; `unparsable`, 1 where no answer was found.
    """
    choices = tuple(extra_info.get("choices", ())) if extra_info else ()
    found = find_answer(solution_str, choices)
    gold = ground_truth if choices else canonical_answer(ground_truth)
    score = float(found is not None and found.canonical == gold)
    return {"score": score, "acc": score, "unparsable": float(found is None)}


def reward_source() -> str:
    """`compute_score` and everything of this package that it uses, as one Python file that imports the standard library alone.

    Annotations are evaluated there, not kept as text: verl loads the file without entering it in `sys.modules`, where the dataclasses of
    Python would look up the names in a text.
    """
    gathered = _Gathered()
    gathered.gather(__name__, compute_score.__name__)
    header = "# Written by `rlprior export-rl`: the rule-based verifier, and the reward function that verl calls.\n"
    return "\n\n\n".join([header + "\n" + "\n".join(sorted(gathered.imports)), *gathered.definitions]) + "\n"


@dataclass
class _Gathered:
    """Definitions in an order in which they can be executed, and what they import from elsewhere."""

    definitions: list[str] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    _seen: set[str] = field(default_factory=set)

    def gather(self, module: str, name: str) -> None:
        """Append the definition of `name`, after those that it uses."""
        source, nodes = _read_module(module)
        for node in nodes:
            if name not in _bound_names(node) or f"{module}.{name}" in self._seen:
                continue
            self._seen.add(f"{module}.{name}")
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._follow(node, name)
                return
            for used in ast.walk(node):
                if isinstance(used, ast.Name) and used.id != name:
                    self.gather(module, used.id)
            self.definitions.append(_with_comments(source, node))

    def _follow(self, node: ast.Import | ast.ImportFrom, name: str) -> None:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == __name__.split(".")[0]:
            self.gather(node.module or "", name)
        else:
            aliases = [alias for alias in node.names if (alias.asname or alias.name) == name]
            alone = (
                ast.Import(aliases)
                if isinstance(node, ast.Import)
                else ast.ImportFrom(node.module, aliases, 0)
            )
            self.imports.add(ast.unparse(alone))


@functools.cache
def _read_module(module: str) -> tuple[str, list[ast.stmt]]:
    source = inspect.getsource(importlib.import_module(module))
    return source, ast.parse(source).body


def _bound_names(node: ast.stmt) -> set[str]:
    """Names that a statement at the top of a module binds."""
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Import() | ast.ImportFrom():
            return {alias.asname or alias.name for alias in node.names}
        case ast.Assign():
            return {target.id for target in node.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case _:
            return set()


def _with_comments(source: str, node: ast.stmt) -> str:
    """Source of a statement with its decorators and the comment lines right above it."""
    lines = source.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    while first > 1 and lines[first - 2].startswith("#"):
        first -= 1
    return "\n".join(lines[first - 1 : node.end_lineno])
