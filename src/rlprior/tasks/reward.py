"""A user's own reward function, `path.py:function`: body of a worker process, which may hang or die in it."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from rlprior.config import RunError

_REWARD = re.compile(r"(?P<path>.+\.py):(?P<function>[^\W\d]\w*)")


def split_reward(verifier: str) -> tuple[str, str] | None:
    """File and function of a reward function, None where the text names none.

    >>> split_reward("rewards/length.py:short"), split_reward("math")
    (('rewards/length.py', 'short'), None)
    """
    match = _REWARD.fullmatch(verifier)
    return (match["path"], match["function"]) if match else None


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
        raise RunError(f"{path}: has no function {function!r}")
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
            if not isinstance(value, str) and math.isfinite(number := float(value)):
                return {"reward": number}
        return {"error": f"{where}: {function} returned {value!r:.40}; it must return a finite number"}

    return apply


def _describe(error: BaseException, path: str) -> str:
    """One line: the file's line that raised, and what."""
    where = path
    if isinstance(error, SyntaxError) and error.filename == path:
        where = f"{path}:{error.lineno}"
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) == Path(path):
            where = f"{path}:{frame.lineno}"
    message = str(error.msg if isinstance(error, SyntaxError) else error)
    first = (message.splitlines() or [""])[0]
    return f"{where}: {type(error).__name__}: {first:.200}".rstrip(": ")
