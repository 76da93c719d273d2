"""Rule-based verifier: extract the final answer of a response and compare it exactly with the gold answer.

Nothing is evaluated: a number is a literal, a decimal or one fraction of two literals, so no response can make it slow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rlprior.tasks.problem import LETTERS, Problem, Status, Verdict

MAX_READ_CHARACTERS = 2000
MAX_NUMBER_CHARACTERS = 100

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_STATED = re.compile(
    r"the\s+(?:final\s+)?answer\s+is\b(?:[ \t]+(?:then|therefore|thus))?[ \t]*:?(?=(?P<rest>[^\n]*))",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####(?P<rest>[^\n#]*)")
_SENTENCE_END = re.compile(r"\.(?:\s|$)")

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<whole>{_DIGITS})?(?:\.(?P<decimals>[0-9]*))?")
_LATEX_FRACTION = re.compile(
    r"(?P<sign>[+-]?)\s*\\frac\s*(?:\{(?P<a>[^{}]*)\}|(?P<c>[0-9]))\s*(?:\{(?P<b>[^{}]*)\}|(?P<d>[0-9]))"
)
# "72 clips" states 72; "5 or 7", "3 and a half" and "2 million" do not state their first number.
_WITH_UNIT = re.compile(
    r"(?P<number>[^\sa-zA-Z]+)\s+"
    r"(?!.*\b(?:or|and|to|plus|minus|times|over|dozen|hundred|thousand|[mbtr]+illion|half|halves|third|thirds|quarters?)\b)"
    r"[a-zA-Z'-]{2,}(?:\s+[a-zA-Z'-]{2,}){0,2}"
)
_CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?\(?(?P<letter>[A-Za-z])(?![A-Za-z0-9])[).:]{0,2}(?:\s+(?P<rest>.*))?",
    re.IGNORECASE | re.ASCII | re.DOTALL,
)
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_PUNCTUATION = re.compile(r"\s*([^\w\s])\s*")
_NOISE = re.compile(r"\\left|\\right|\\[!,;: ()\[\]]|\\?[$%]|(?<![\w)])\*\*|\*\*(?![\w(])")


def verify(problem: Problem, response: str, *, truncated: bool = False) -> Verdict:
    r"""Compare the final answer of a response with the problem's.

    The answer is the last balanced `\boxed{...}`, or else what follows the last "the answer is", or else what follows the
    last `####`. Numbers are compared as exact fractions, everything else as normalised text, and of a multiple-choice question the
    letter. These rules never time out: `Status.TIMED_OUT` and `Status.FAILED` are for verifiers that call an engine.

    Args:
        problem: the problem that was posed.
        response: the text that follows `problem.prompt`; its last 2000 characters are read.
        truncated: the response was cut by the length limit.

    Returns:
        CORRECT or WRONG with the canonical answer; without an answer UNPARSABLE, or TRUNCATED if the response was cut.

    >>> problem = Problem(id="", task="", difficulty=1, prompt="Q: 37+48\nA:", solution=" #### 85", answer="85")
    >>> verify(problem, " 7+8=15, 3+4+1=8 #### 85").status.value
    'correct'
    >>> verify(problem, " 7+8=15, 3+4", truncated=True)
    Verdict(status=<Status.TRUNCATED: 'truncated'>, extracted=None)
    """
    choices = problem.choices
    found = find_answer(response, choices)
    # of a response that was cut, an answer that one more digit would change was not finished
    if found is None or (truncated and not _is_finished(response, found, choices)):
        return Verdict(Status.TRUNCATED if truncated else Status.UNPARSABLE, None)
    correct = found.canonical == (problem.answer if choices else canonical_answer(problem.answer))
    return Verdict(Status.CORRECT if correct else Status.WRONG, found.canonical)


@dataclass(frozen=True)
class Answer:
    """The final answer of a response, as written and in canonical form."""

    text: str
    canonical: str


def find_answer(response: str, choices: Sequence[str] = ()) -> Answer | None:
    """The final answer of a response, None where it states none: with `choices`, a letter of one of them."""
    tail = response[-MAX_READ_CHARACTERS:]
    candidates = [last_boxed(tail), stated_answer(tail), _after_last(_HASHES, tail)]
    if choices:
        candidates.append(response if response == tail else None)
    for text in candidates:
        if text is not None and (
            canonical := chosen_letter(text, choices) if choices else canonical_answer(text)
        ):
            return Answer(text, canonical)
    return None


def _is_finished(response: str, found: Answer, choices: Sequence[str]) -> bool:
    longer = find_answer(response + "0", choices)
    return longer is not None and longer.canonical == found.canonical


def extract_answer(response: str) -> str | None:
    """Canonical form of the final answer of a response, None where it states none."""
    found = find_answer(response)
    return found.canonical if found else None


def chosen_letter(text: str, choices: Sequence[str]) -> str:
    r"""The letter that a whole text is, alone or followed by that choice's own words; empty where it is anything else.

    >>> [chosen_letter(text, ["3", "4"]) for text in ("B", " (b). ", r"\text{(B)}", "B. 4", "(B) 3", "A or B", "C", "4")]
    ['B', 'B', 'B', 'B', '', '', '', '']
    """
    match = _CHOICE.fullmatch(_NOISE.sub("", _TEXT_COMMAND.sub(r"\1", text)).strip())
    place = LETTERS.index(match["letter"].upper()) if match else len(choices)
    if match is None or place >= len(choices):
        return ""
    rest = canonical_answer(match["rest"] or "")
    return LETTERS[place] if not rest or rest == canonical_answer(choices[place]) else ""


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` whose braces are balanced, None where there is none.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    open_braces: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                start, boxed = open_braces.pop()
                if boxed and (best is None or start > best[0]):
                    best = (start, match.start())
        elif token.endswith("{") and token != r"\{":
            open_braces.append((match.end(), token != "{"))
    return None if best is None else text[best[0] : best[1]]


def stated_answer(text: str) -> str | None:
    """What follows the last "the answer is", up to the end of its sentence or line; None without it.

    >>> stated_answer("The answer is 3. No: so the answer is (B).")
    '(B)'
    """
    return _after_last(_STATED, text)


def _after_last(marker: re.Pattern[str], text: str) -> str | None:
    last = None
    for match in marker.finditer(text):
        last = match
    if last is None:
        return None
    rest = last["rest"].strip()
    end = _SENTENCE_END.search(rest)
    return rest[: end.start()] if end else rest


def canonical_answer(text: str) -> str:
    r"""One spelling per answer: integers, terminating decimals and reduced fractions; other text normalised.

    Currency and percent signs, thousands separators, units after a number, what leads up to the last `=` and LaTeX spacing are dropped.

    >>> [canonical_answer(text) for text in ("$1,200.50", r"\frac{2}{6}", "x = 4/8", "72 clips", " Yes. ")]
    ['1200.5', '1/3', '0.5', '72', 'yes']
    """
    text = (
        text.replace("\u2212", "-")
        .replace("{,}", ",")
        .replace(r"\dfrac", r"\frac")
        .replace(r"\tfrac", r"\frac")
    )
    bare = _TEXT_COMMAND.sub(" ", text)
    if not bare.strip():
        bare = _TEXT_COMMAND.sub(r"\1", text)
    bare = _NOISE.sub("", bare).strip().rstrip(".").strip()
    bare = _EQUALS.split(bare)[-1].strip()
    value = _parse_number(bare)
    if value is None and (match := _WITH_UNIT.fullmatch(bare)):
        value = _parse_number(match["number"])
    if value is not None:
        return _number_text(value)
    return " ".join(_PUNCTUATION.sub(r"\1", bare.casefold()).split())


def is_number(text: str) -> bool:
    """Whether a whole text is one number.

    >>> is_number("27.0"), is_number("27 or 28")
    (True, False)
    """
    return _parse_number(_NOISE.sub("", text).strip()) is not None


def _parse_number(text: str) -> Fraction | None:
    """Value of a literal, a decimal, `a/b` or `\\frac{a}{b}`; None for anything else, however close."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    if match := _LATEX_FRACTION.fullmatch(text):
        parts = (match["a"] or match["c"] or "", match["b"] or match["d"] or "")
        sign = -1 if match["sign"] == "-" else 1
    else:
        above, slash, below = text.partition("/")
        if not slash:
            return _parse_decimal(text)
        parts, sign = (above, below), 1
    numerator, denominator = (_parse_decimal(part.strip()) for part in parts)
    if numerator is None or denominator is None or denominator == 0:
        return None
    return sign * numerator / denominator


def _parse_decimal(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if not match or not (match["whole"] or match["decimals"]):
        return None
    decimals = match["decimals"] or ""
    digits = (match["whole"] or "").replace(",", "") + decimals
    value = Fraction(int(digits), 10 ** len(decimals))
    return -value if match["sign"] == "-" else value


def _number_text(value: Fraction) -> str:
    rest, num_twos, num_fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, num_twos = rest // 2, num_twos + 1
    while rest % 5 == 0:
        rest, num_fives = rest // 5, num_fives + 1
    if rest != 1 or value.denominator == 1:
        return str(value)
    places = max(num_twos, num_fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
