"""Mathematical equivalence by math-verify: body of a worker process, which may hang or die on any answer."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

from rlprior.config import UsageError
from rlprior.tasks.canonical import respell, states_other_amount
from rlprior.tasks.verify import last_boxed

PACKAGE = "math_verify"

_MIXED = re.compile(r"(?<![0-9.,/])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9.,/])")
_LETTER_COMMAND = re.compile(r"\\(?:text|mathrm|textrm)\s*\{\s*([A-Za-z])\s*\}")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{([^{}]*)\}")
_SEPARATOR = re.compile(r"\s*,?\s*(?:or|and)\s*|[\s,;]*")
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\s*\{[A-Za-z]*\})?")
_WORD = re.compile(r"[A-Za-z]{4,}")
_NUMBERS_APART = re.compile(r"(?<!\\frac )(?<![_^])[0-9]\s+[0-9]")
_TIME = re.compile(r"\b[0-9]{1,2}:[0-9]{2}\b")
_BASE = re.compile(r"[0-9]\s*_\s*\{?\s*([0-9]+)")


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


def comparison_pair(gold: str, answer: str) -> list[str] | None:
    r"""Two answers as math-verify is asked about them; None where it would read something else than they say.

    Mixed numbers and upright letters (`\mathrm{i}`) are written as it reads them. It adds up numbers that stand side by side ("2 5" is 7),
    drops what `\text{...}` says about a number ("thousand", "or more") and the base of a numeral, divides the hours of a time by its minutes,
    and takes words for products of their letters: it is not asked about these.

    >>> comparison_pair("5/2", "2 1/2"), comparison_pair("7", r"7\text{ thousand}"), comparison_pair("live", "evil")
    (['5/2', '2\\frac{1}{2}'], None, None)
    """
    pair = [
        _LETTER_COMMAND.sub(r" \1 ", _MIXED.sub(r"\1\\frac{\2}{\3}", respell(one))) for one in (gold, answer)
    ]
    bases = {match[1] for match in map(_BASE.search, pair) if match}
    return None if len(bases) > 1 or any(map(_is_misread, pair)) else pair


def _is_misread(text: str) -> bool:
    words = _WORD.findall(_COMMAND.sub(" ", _TEXT_COMMAND.sub(" ", text)))
    notes = [note for note in _TEXT_COMMAND.findall(text) if not _SEPARATOR.fullmatch(note)]
    return (
        not is_one_answer(text)
        or len(words) > 1
        or bool(words and text.strip() == words[0])
        or any(map(states_other_amount, notes))
        or bool(_NUMBERS_APART.search(text) or _TIME.search(text))
    )


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
