"""Problems from JSON Lines files: GSM8K's `question` and `answer`, MATH's `problem` and `solution`, or multiple choice."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError
from rlprior.tasks.canonical import canonical_answer, canonical_answers, is_number, split_answers
from rlprior.tasks.problem import LETTERS, Problem, choice_question, question_id, question_prompt
from rlprior.tasks.verify import last_boxed

_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\.,]+)")
_COMMA = re.compile(r"(?<!\{),\s*")
_MARKUP_DOLLAR = re.compile(r"(?<!\\)\$")
CALCULATOR_MARKS = re.compile(r"<<[^>]*>>")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines of a UTF-8 file, `.gz` or not, without line ends.

    Raises:
        UsageError: there is no such file.
        RunError: a byte that is not UTF-8 (with its offset in the uncompressed file), or a damaged archive.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of a data file")
    offset = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    position = offset + error.start
                    raise RunError(
                        f"{path}: byte {position} is not UTF-8; convert the file to UTF-8"
                    ) from None
                offset += len(line)
                yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")
    except (EOFError, zlib.error, OSError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a JSON Lines file, `.gz` or not; blank lines are skipped.

    Raises:
        UsageError: there is no such file.
        RunError: an empty file, or a line that is not a JSON object of UTF-8 text, with the line's number.
    """
    empty = True
    for number, line in read_lines(path):
        if not line.strip():
            continue
        empty = False
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise RunError(f"{path}:{number}: not JSON ({reason}); write one JSON object a line") from None
        if not isinstance(record, dict):
            raise RunError(f"{path}:{number}: not a JSON object; write one object a line")
        yield number, record
    if empty:
        raise RunError(f"{path}: the file is empty; it needs one JSON object a line")


def check_text(text: str, where: str) -> str:
    r"""`text` itself; RunError if it holds half a surrogate pair, which JSON can escape but UTF-8 cannot hold.

    >>> check_text("fine", "file:1")
    'fine'
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RunError(
            f"{where}: character {error.start} is half a surrogate pair, not Unicode text"
        ) from None
    return text


def load_problems(path: Path, *, any_answer: bool = False) -> list[Problem]:
    """Problems of a JSON Lines file, in file order; a question that comes again is left out.

    A record has `question` and `answer` (a worked answer that ends with `#### <answer>`, or a bare number), or `problem` and
    `solution` (with the answer in `\\boxed{}`), or `question`, `choices` (a list) and `answer` (a letter, or a position from 0). GSM8K's
    `<<...>>` marks are stripped.

    Args:
        path: of the file.
        any_answer: an `answer` without `####` may be any text, for verifiers that read more than numbers.

    Raises:
        UsageError: no such file, or a record without these fields.
        RunError: an empty file, a line that is not JSON, undecodable bytes, or no gold answer, with file and line.
    """
    problems: dict[str, Problem] = {}
    task = f"{path.parent.name}/{path.name.partition('.')[0]}"
    for number, record in read_json_lines(path):
        where = f"{path}:{number}"
        read = _read_choices if "choices" in record else _read_record
        gold = read(record, where, any_answer)
        identity = question_id("file", gold.question)
        problems.setdefault(
            identity,
            Problem(
                id=identity,
                task=task,
                difficulty=0,
                prompt=question_prompt(gold.question),
                solution=f" {gold.worked}\n#### {gold.answer}" if gold.worked else f" #### {gold.answer}",
                answer=gold.answer,
                written_answer=gold.written if gold.written != gold.answer else None,
                choices=gold.choices,
            ),
        )
    return list(problems.values())


@dataclass(frozen=True)
class Gold:
    """A gold answer, as the fields of a `Problem` hold it.

    Attributes:
        answer: in canonical form.
        written_answer: as it was written, for whoever reads more than canonical forms.
        reference: `{"answers": [...]}` where all of several must be given, each as it was written; None where there is one.
    """

    answer: str
    written_answer: str
    reference: dict[str, list[str]] | None = None


def read_gold(value: Any, where: str, *, several: bool = False) -> Gold:
    r"""The gold answer that a field of a benchmark holds: a number (AMC's `27.0`), a text, or a list of texts (OlympiadBench).

    Args:
        value: of the field. Of a list all members are answers that must be given, in any order.
        where: file and line, for errors.
        several: a text lists several answers (`$0, 3$`), all of which must be given, in any order.

    Raises:
        RunError: no answer in it, with file and line.

    >>> read_gold(27.0, "amc.jsonl:1").answer, read_gold([r"$\frac{1}{2}$"], "olympiad.jsonl:1").written_answer
    ('27', '\\frac{1}{2}')
    >>> read_gold("$(1,2), 3$", "olympiad.jsonl:2", several=True).reference
    {'answers': ['(1, 2)', '3']}
    """
    values = value if isinstance(value, list) else [value]
    texts = [_gold_text(one, where) for one in values]
    if several:
        # no comma is a thousands separator here, but for the one that LaTeX writes in braces
        texts = [part for text in texts for part in split_answers(_COMMA.sub(", ", text))]
    if not texts or not all(map(canonical_answer, texts)):
        raise RunError(
            f"{where}: no gold answer; it must be a number, a text or a list of them, not {value!r:.40}"
        )
    if len(texts) == 1 and not several:
        return Gold(canonical_answer(texts[0]), texts[0])
    return Gold(canonical_answers(texts), ", ".join(texts), {"answers": texts})


def read_gold_in_solution(solution: str, where: str) -> Gold:
    r"""The gold answer of a worked solution (MATH, MinervaMath): its last `\boxed{}`, with or without braces, or `\fbox{}`.

    Raises:
        RunError: there is no box in it, or nothing in the box, with file and line.

    >>> read_gold_in_solution(r"Hence $\boxed 2$.", "math.jsonl:1").answer
    '2'
    """
    gold = _last_box(solution)
    if gold is None:
        raise RunError(rf"{where}: no gold answer; the solution must have it in \boxed{{}}")
    return read_gold(gold, where)


def _last_box(solution: str) -> str | None:
    return last_boxed(_BARE_BOX.sub(r"\\boxed{\1}", solution.replace(r"\fbox", r"\boxed")))


def _gold_text(value: Any, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) or (isinstance(value, int | float) and is_number(str(value))):
        # "$0$, $3$": unescaped dollar signs are markup
        return _MARKUP_DOLLAR.sub("", check_text(str(value), where)).strip()
    return ""


@dataclass(frozen=True)
class _Gold:
    """What a record says: the question, the working without the final answer, and the answer, canonical and as written."""

    question: str
    worked: str
    answer: str
    written: str
    choices: tuple[str, ...] = ()


def _read_record(record: dict[str, Any], where: str, any_answer: bool) -> _Gold:
    if "question" in record and "answer" in record:
        question, text = _field(record, "question", where), _field(record, "answer", where)
        text = CALCULATOR_MARKS.sub("", text)
        worked, marker, gold = text.rpartition("####")
        if not marker and not any_answer and not is_number(gold):
            raise RunError(
                f"{where}: no gold answer; `answer` must end with #### and the answer, or be a number"
            )
    elif "problem" in record and "solution" in record:
        question, worked = _field(record, "problem", where), _field(record, "solution", where)
        gold = _last_box(worked) or ""
    else:
        raise UsageError(
            f"{where}: needs `question` and `answer`, or `problem` and `solution`; it has {', '.join(record) or 'nothing'}"
        )
    answer = canonical_answer(gold) or (gold.strip() if any_answer else "")
    if not answer or not question:
        missing = (
            "question" if not question else r"gold answer; write #### <answer> or \boxed{<answer>} at the end"
        )
        raise RunError(f"{where}: no {missing}")
    return _Gold(question, worked.strip(), answer, gold.strip())


def _read_choices(record: dict[str, Any], where: str, any_answer: bool) -> _Gold:
    for name in ("question", "answer"):
        if name not in record:
            raise UsageError(f"{where}: `choices` needs `question` and `answer` beside it; add `{name}`")
    question, choices, answer = _field(record, "question", where), record["choices"], record["answer"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise RunError(f"{where}: `choices` must be a list of 2 to {len(LETTERS)} texts")
    texts = tuple(_field({"choices": choice}, "choices", where) for choice in choices)
    letters = LETTERS[: len(texts)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        letter = letters[answer]
    elif isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        letter = answer.strip().upper()
    else:
        raise RunError(
            f"{where}: `answer` must be a letter from A to {letters[-1]}, or a whole number from 0 to {len(texts) - 1} "
            f"that counts the choices, not {answer!r:.40}"
        )
    if not question:
        raise RunError(f"{where}: no question")
    return _Gold(choice_question(question, texts), "", letter, letter, texts)


def _field(record: dict[str, Any], name: str, where: str) -> str:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RunError(f"{where}: `{name}` must be text, not {type(value).__name__}")
    return check_text(str(value), where).strip()
