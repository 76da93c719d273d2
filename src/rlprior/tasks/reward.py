"""A user's own reward function, `path.py:function`: body of a worker process, which may hang or die in it."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import symtable
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from rlprior.config import RunError, UsageError

MAX_REWARD = 1e15
"""Rewards are float32 in training, and squared."""

_REWARD = re.compile(r"(?P<path>.+\.py):(?P<function>[^\W\d]\w*)")


def split_reward(verifier: str) -> tuple[str, str] | None:
    """File and function of a reward function, None where the text names none.

    >>> split_reward("rewards/length.py:short"), split_reward("math")
    (('rewards/length.py', 'short'), None)
    """
    match = _REWARD.fullmatch(verifier)
    return (match["path"], match["function"]) if match else None


def check_reward(path: Path, function: str) -> None:
    """Read a reward file without running it: what takes hours to reach should not fail there for want of a name.

    Raises:
        UsageError: there is no such file, it is not Python, or defines no such name.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of a Python file, as in path.py:function")
    try:
        names = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: {error.msg}") from None
    except ValueError as error:  # of bytes that are not UTF-8, or null bytes
        raise UsageError(f"{path}: not Python source: {error}") from None
    if function not in names.get_identifiers():
        raise UsageError(f"{path}: defines no function {function!r}")


def load_reward(path: str, function: str) -> Callable[[list[str]], dict[str, Any]]:
    """Run a file and wrap its function: of [prompt, response, answer], `{"reward": number}` or `{"error": line}`.

    Raises:
        RunError: the file cannot be run, or has no such function.
    """
    spec = importlib.util.spec_from_file_location("rlprior_user_reward", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RunError(_describe(error, path)) from None
    reward = getattr(module, function, None)
    if not callable(reward):
        raise RunError(f"{path}: {function} is not a function")
    code = getattr(reward, "__code__", None)
    where = f"{path}:{code.co_firstlineno}" if isinstance(code, CodeType) else path

    def apply(item: list[str]) -> dict[str, Any]:
        try:
            value: Any = reward(*item)
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            return {"error": f"{_describe(error, path)}; called as {function}(prompt, response, answer)"}
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if not isinstance(value, str) and abs(number := float(value)) <= MAX_REWARD:
                return {"reward": number}
        return {
            "error": f"{where}: {function} returned {value!r:.40}; it must return a finite number, at most {MAX_REWARD:g} in size"
        }

    return apply


def _describe(error: BaseException, path: str) -> str:
    """One line: the file's line that raised, and what."""
    where = path
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) == Path(path):
            where = f"{path}:{frame.lineno}"
    first = (str(error).splitlines() or [""])[0]
    return f"{where}: {type(error).__name__}: {first:.200}".rstrip(": ")
