"""Rule-based verifier: extract the final answer of a response and compare it exactly with the gold answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlprior.tasks.canonical import canonical_answer, canonical_answers, remove_markup, respell, split_answers
from rlprior.tasks.problem import LETTERS, Problem, Status, Verdict

MAX_READ_CHARACTERS = 2000

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_STATED = re.compile(
    r"the\s+(?:(?:final|correct|best)\s+)?answer\s+is\b(?:[ \t]+(?:then|therefore|thus))?[ \t]*:?(?=(?P<rest>[^\n]*))",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####(?P<rest>[^\n#]*)")
_SENTENCE_END = re.compile(r"\.(?:\s|$)")

_CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?\(?(?P<letter>[A-Za-z])(?![A-Za-z0-9])[).:]{0,2}(?:\s+(?P<rest>.*))?",
    re.IGNORECASE | re.ASCII | re.DOTALL,
)
# "\boxed{2} and $x = \boxed{5}$": one answer in several boxes
_BETWEEN_BOXES = re.compile(
    r"\s*(?:\\?[$)\]]\s*)*(?:;|,?\s*(?:\b(?:or|and)\b|\\text\s*\{\s*,?\s*(?:or|and)\s*\})|,)\s*"
    r"(?:\\?[$(\[]\s*)*(?:[A-Za-z](?:_\{?[0-9]\}?)?\s*=\s*)?"
)


def verify(problem: Problem, response: str, *, truncated: bool = False) -> Verdict:
    r"""Compare the final answer of a response with the problem's.

    The answer is the last balanced `\boxed{...}` (with those before it that "and", "or" or a comma joins to it), or else what follows the last "the answer is", or else what follows the
    last `####`. Numbers are compared as exact fractions, everything else as normalised text, and of a multiple-choice question the
    letter. Of a problem with several answers (`reference["answers"]`) all must be given, in any order. These rules never time out: `Status.TIMED_OUT` and `Status.FAILED` are for verifiers that call an engine.

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
    if golds := several_answers(problem):
        extracted, gold = canonical_answers(split_answers(found.text)), canonical_answers(golds)
    else:
        extracted, gold = found.canonical, problem.answer if choices else canonical_answer(problem.answer)
    return Verdict(Status.CORRECT if extracted == gold else Status.WRONG, extracted)


def several_answers(problem: Problem) -> list[str]:
    """The answers of a problem that asks for more than one, empty for any other."""
    return problem.reference.get("answers", []) if isinstance(problem.reference, dict) else []


@dataclass(frozen=True)
class Answer:
    """The final answer of a response, as written and in canonical form."""

    text: str
    canonical: str


def find_answer(response: str, choices: Sequence[str] = ()) -> Answer | None:
    """The final answer of a response, None where it states none: with `choices`, a letter of one of them."""
    tail = response[-MAX_READ_CHARACTERS:]
    candidates = [_boxed_answer(tail), stated_answer(tail), _after_last(_HASHES, tail)]
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
    match = _CHOICE.fullmatch(remove_markup(respell(text)))
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
    boxes = _find_boxes(text)
    return boxes[-1].content if boxes else None


def _boxed_answer(text: str) -> str | None:
    """What the last box says together with those that are joined to it; a box that only repeats another adds nothing."""
    boxes = _find_boxes(text)
    if not boxes:
        return None
    contents, first = [boxes[-1].content], boxes[-1].start
    for box in reversed(boxes[:-1]):
        if box.end > first:  # around the other
            continue
        if not _BETWEEN_BOXES.fullmatch(text, box.end, first):
            break
        contents.insert(0, box.content)
        first = box.start
    return contents[-1] if len({canonical_answer(one) for one in contents}) == 1 else ", ".join(contents)


@dataclass(frozen=True)
class _Box:
    start: int
    end: int
    content: str


def _find_boxes(text: str) -> list[_Box]:
    """Balanced boxes, in the order in which they begin."""
    open_braces: list[tuple[int, int, bool]] = []
    boxes: list[_Box] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                start, inside, boxed = open_braces.pop()
                if boxed:
                    boxes.append(_Box(start, match.end(), text[inside : match.start()]))
        elif token.endswith("{") and token != r"\{":
            open_braces.append((match.start(), match.end(), token != "{"))
    return sorted(boxes, key=lambda box: box.start)


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
