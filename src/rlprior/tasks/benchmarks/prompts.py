"""Pieces that the prompts and readers of several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence

from rlprior.config import RunError
from rlprior.seeding import numpy_generator
from rlprior.tasks.benchmarks.sources import Record
from rlprior.tasks.problem import LETTERS, Problem

THE_ANSWER_IS = (
    'Think step by step, and end with "the answer is (X)", X being the letter of the right choice.'
)


def lettered(choices: Sequence[str], form: str, separator: str = "\n") -> str:
    """Choices with their letters.

    >>> lettered(["3", "4"], "({}) {}", " ")
    '(A) 3 (B) 4'
    """
    return separator.join(form.format(*pair) for pair in zip(LETTERS, choices, strict=False))


def check_choices(record: Record, name: str, choices: Sequence[str]) -> tuple[str, ...]:
    """The choices of a record; RunError where they are not 2 to 26 texts, none of them empty."""
    if not 2 <= len(choices) <= len(LETTERS) or not all(choices):
        raise record.wrong(name, f"2 to {len(LETTERS)} texts, none of them empty")
    return tuple(choices)


def labelled_choices(record: Record, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels and texts of a field that is an object with a list of each."""
    field = record[name]
    labels, texts = (field.get("label"), field.get("text")) if isinstance(field, dict) else (None, None)
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise record.wrong(name, "an object with as many `label` as `text`")
    return tuple(map(str, labels)), check_choices(record, name, [str(text).strip() for text in texts])


def gold_letter(record: Record, name: str, labels: Sequence[str]) -> str:
    """The letter of the choice whose label a field holds.

    Args:
        record: with the field.
        name: of the field: a label, or a position from 0 if it is a whole number that is no label.
        labels: of the choices, in their order.
    """
    value = record[name]
    if (
        not isinstance(value, bool) and str(value).strip() in labels
    ):  # WinoGrande's 1 and 2, stored as numbers
        return LETTERS[list(labels).index(str(value).strip())]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return LETTERS[value]
    raise record.wrong(name, f"one of {', '.join(labels)}, or a position from 0")


def shuffled_choices(right: str, others: Sequence[str], key: str) -> tuple[tuple[str, ...], str]:
    """Choices in an order that the key fixes, and the letter of the right one.

    >>> shuffled_choices("a", ["b", "c"], "another question")
    (('b', 'a', 'c'), 'B')
    """
    order = numpy_generator(0, "choices", key).permutation(len(others) + 1).tolist()
    choices = [right, *others]
    return tuple(choices[place] for place in order), LETTERS[order.index(0)]


def likelihood_problem(prompt: str, choices: Sequence[str], answer: str, *, group: str = "") -> Problem:
    """A question whose choices are scored as continuations of `prompt`, each after a space."""
    texts = tuple(" " + choice for choice in choices)
    solution = texts[LETTERS.index(answer)]
    return Problem(
        id="",
        task="",
        difficulty=0,
        prompt=prompt,
        solution=solution,
        answer=answer,
        choices=texts,
        group=group,
    )


def letter_problem(
    prompt: str, choices: Sequence[str], answer: str, *, worked: str | None = None, group: str = ""
) -> Problem:
    """A multiple-choice question whose sampled answer ends in a letter; `worked` is its answer in an example."""
    return Problem(
        id="",
        task="",
        difficulty=0,
        prompt=prompt,
        solution=f" {worked}" if worked else f" The answer is ({answer}).",
        answer=answer,
        choices=tuple(choices),
        group=group,
    )


def split_examples(text: str, where: str) -> tuple[str, tuple[str, ...]]:
    r"""Preamble and examples of a file of worked examples, each of which begins a paragraph with "Q: ".

    >>> split_examples("About sums.\n\nQ: 1+1\nA: 2\n\nQ: 2+2\nA: 4\n", "file")
    ('About sums.\n\n', ('Q: 1+1\nA: 2', 'Q: 2+2\nA: 4'))
    """
    preamble, *examples = ("\n\n" + text.strip()).split("\n\nQ: ")
    if not examples:
        raise RunError(f"{where}: no worked examples; each begins a paragraph with 'Q: '")
    opening = preamble.strip()
    return f"{opening}\n\n" if opening else "", tuple("Q: " + one.strip() for one in examples)
