"""Mathematical equivalence by math-verify: body of a worker process, which may hang or die on any answer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from rlprior.config import UsageError
from rlprior.tasks.verify import last_boxed

PACKAGE = "math_verify"


def require_math_verify() -> None:
    """Raise UsageError, with what to install, where math-verify is not there."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UsageError("verifier = 'math' needs math-verify; install it with: pip install 'rlprior[math]'")


def is_one_answer(text: str) -> bool:
    r"""Whether a text stays one answer inside `\boxed{}`: one that closes the brace could state a second.

    >>> is_one_answer(r"\frac{1}{2}"), is_one_answer(r"5} or \boxed{7")
    (True, False)
    """
    return last_boxed(rf"\boxed{{{text}}}") == text


def load_comparison() -> Callable[[list[str]], bool]:
    r"""A function that says of a pair (gold, answer) whether math-verify takes the answer for the gold one.

    Both are read as the content of `\boxed{}` and nothing else, so that a list of guesses is a set of numbers and not any one of
    them. math-verify is asked in this order alone: it is not symmetric.
    """
    import logging
    import warnings

    logging.disable()  # it warns that its own timeouts are off; they need the main thread and do not stop everything
    warnings.simplefilter("ignore")
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy.core.cache import clear_cache

    extraction = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list[Any]:
        return parse(rf"\boxed{{{text}}}", extraction, fallback_mode="no_fallback", parsing_timeout=0)

    def compare(pair: list[str]) -> bool:
        gold, answer = pair
        clear_cache()  # an answer's verdict must not depend on the answers before it
        return verify(read(gold), read(answer), timeout_seconds=0)

    compare([r"\frac{1}{2}", "0.25"])  # builds the parser's tables, which no deadline should pay for
    return compare
