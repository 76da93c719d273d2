"""Short free text against accepted aliases, and exact text after "the answer is"."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlprior.tasks.problem import Problem, Status
from rlprior.tasks.verifier import AliasVerifier, ExactVerifier

RIGHT, WRONG, NONE, CUT = Status.CORRECT, Status.WRONG, Status.UNPARSABLE, Status.TRUNCATED


def problem(answer: str, *, aliases: tuple[str, ...] = (), choices: tuple[str, ...] = ()) -> Problem:
    return Problem(
        id="0",
        task="t",
        difficulty=0,
        prompt="Q: ?\nA:",
        solution="",
        answer=answer,
        choices=choices,
        reference={"aliases": list(aliases)} if aliases else None,
    )


ALIAS_TABLE = [
    # gold, response, nothing for punctuation, a space for punctuation
    ("Paris", " Paris", RIGHT, RIGHT),
    ("Paris", "paris.\n\nQ: And of Spain?\nA: Madrid", RIGHT, RIGHT),
    ("Paris", "\n\n The  PARIS!", RIGHT, RIGHT),
    ("Paris", "Madrid\nParis", WRONG, WRONG),
    ("Paris", "Paris or Madrid", WRONG, WRONG),
    ("Paris", "Paris, France", WRONG, WRONG),
    ("Paris", "It is Paris", WRONG, WRONG),
    ("Paris", "", NONE, NONE),
    ("Paris", " \n\t\n", NONE, NONE),
    ("the Beatles", "Beatles", RIGHT, RIGHT),
    ("The The", "the the", RIGHT, RIGHT),
    ("The The", "The", WRONG, WRONG),
    ("The The", "a an", WRONG, WRONG),
    ("U.S.", "US", RIGHT, WRONG),
    ("U.S.", "U S", WRONG, RIGHT),
    ("Spider-Man", "Spider Man", WRONG, RIGHT),
    ("Spider-Man", "Spiderman", RIGHT, WRONG),
    ("He Ain't Heavy", "he ain\u2019t heavy", RIGHT, RIGHT),
    ("Beyonc\u00e9", "Beyonce\u0301", RIGHT, RIGHT),
    ("Beyonc\u00e9", "Beyonce", WRONG, WRONG),
    ("theatre", "atre", WRONG, WRONG),
    ("14", "14.0", WRONG, WRONG),
    ("\U0001f600", "\U0001f601", WRONG, WRONG),
    ("?", "?", RIGHT, RIGHT),
    ("?", "!", WRONG, WRONG),
]


@pytest.mark.parametrize(("gold", "response", "status", "spaced_status"), ALIAS_TABLE)
def test_the_first_line_is_an_accepted_answer(
    gold: str, response: str, status: Status, spaced_status: Status
) -> None:
    for verifier, expected in (
        (AliasVerifier(), status),
        (AliasVerifier(punctuation_becomes=" "), spaced_status),
    ):
        [verdict] = verifier.grade([(problem(gold), response, False)])
        assert verdict.status is expected
        assert (verdict.extracted is None) == (expected is NONE)


def test_any_alias_is_accepted_and_counts_as_its_own_answer() -> None:
    question = problem("14 December 1972 UTC", aliases=("14 December 1972 UTC", "December 1972"))
    verdicts = AliasVerifier().grade([(question, text, False) for text in ("December, 1972", "1972", "May")])
    assert [one.status for one in verdicts] == [RIGHT, WRONG, WRONG]
    assert [one.extracted for one in verdicts] == ["december 1972", "1972", "may"]


@pytest.mark.parametrize(
    ("response", "status"), [("Paris", CUT), ("Paris\n", RIGHT), ("\n", CUT), ("x" * 5000, CUT)]
)
def test_an_alias_that_was_cut_was_not_finished(response: str, status: Status) -> None:
    [verdict] = AliasVerifier().grade([(problem("Paris"), response, True)])
    assert verdict.status is status


EXACT_TABLE = [
    ("(A)", " Let us see. So the answer is (A).", RIGHT),
    ("(A)", "So the answer is A.", RIGHT),
    ("(A)", "so the answer is **(a)**", RIGHT),
    ("(A)", "So the answer is (B).", WRONG),
    ("(A)", "So the answer is (A) or (B).", WRONG),
    ("(A)", "(A)", NONE),
    ("(A)", "So the answer is", NONE),
    ("(A)", "The answer is (B). So the answer is (A).", RIGHT),
    ("(A)", "So the answer is (A).\n\nQ: Another?\nA: Then.", RIGHT),
    ("True", "So the answer is True.", RIGHT),
    ("True", "So the answer is true", RIGHT),
    ("True", "So the answer is not True.", WRONG),
    ("valid", "So the answer is invalid.", WRONG),
    ("invalid", "So the answer is valid.", WRONG),
    ("Yes", "So the answer is Yes, she does.", WRONG),
    ("] ] >", "So the answer is ] ] >.", RIGHT),
    ("] ] >", "So the answer is ] ]  >.", RIGHT),
    ("] ] >", "So the answer is ] >.", WRONG),
    ("-11520", "So the answer is -11,520.", RIGHT),
    ("24", "So the answer is 24.0.", RIGHT),
    ("24", "So the answer is -24.", WRONG),
    ("24", "So the answer is 2 4.", WRONG),
    ("arson newt parthia", "So the answer is arson newt parthia.", RIGHT),
    ("arson newt parthia", "So the answer is arson parthia newt.", WRONG),
    ("arson newt parthia", 'So the answer is "arson newt parthia".', RIGHT),
    ("Monsters, Inc", "So the answer is Monsters, Inc.", RIGHT),
]


@pytest.mark.parametrize(("gold", "response", "status"), EXACT_TABLE)
def test_exact_text_after_the_answer_is(gold: str, response: str, status: Status) -> None:
    [verdict] = ExactVerifier().grade([(problem(gold), response, False)])
    assert verdict.status is status
    assert (verdict.extracted is None) == (status is NONE)


@pytest.mark.parametrize(
    ("response", "status"),
    [
        ("So the answer is (A", CUT),
        ("So the answer is (A)", CUT),
        ("So the answer is (A).\n", RIGHT),
        ("", CUT),
    ],
)
def test_exact_text_that_was_cut_was_not_finished(response: str, status: Status) -> None:
    [verdict] = ExactVerifier().grade([(problem("(A)"), response, True)])
    assert verdict.status is status


def test_worked_answers_of_multiple_choice_are_graded_by_letter() -> None:
    question = problem("C", choices=("0", "3", "12", "30"))
    texts = [
        "Hence 12. The answer is (C).",
        "The answer is (C) 12.",
        "The answer is (B).",
        "12",
        "The answer is 12.",
    ]
    verdicts = ExactVerifier().grade([(question, text, False) for text in texts])
    assert [one.status for one in verdicts] == [RIGHT, RIGHT, WRONG, NONE, NONE]
    assert [one.extracted for one in verdicts] == ["C", "C", "B", None, None]


def test_versions_tell_the_verifiers_apart() -> None:
    versions = {
        one.version for one in (AliasVerifier(), AliasVerifier(punctuation_becomes=" "), ExactVerifier())
    }
    assert len(versions) == 3


def test_every_accepted_answer_of_nq_open_is_accepted(real_data: Path) -> None:
    lines = (real_data / "nq_open" / "NQ-open.dev.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    responses = [
        (problem(one["answer"][0], aliases=tuple(one["answer"])), f" {alias}\n\nQ: next", False)
        for one in records
        for alias in one["answer"]
    ]
    assert len(responses) > len(records) == 3610
    assert {verdict.status for verdict in AliasVerifier().grade(responses)} == {RIGHT}


def test_every_target_of_big_bench_hard_is_exact(real_data: Path) -> None:
    targets = sorted(
        {
            example["target"]
            for path in (real_data / "bbh").glob("*.json")
            for example in json.loads(path.read_text())["examples"]
        }
    )
    golds = [problem(target) for target in targets]
    verdicts = ExactVerifier().grade([(gold, f" So the answer is {gold.answer}.", False) for gold in golds])
    assert {verdict.status for verdict in verdicts} == {RIGHT}
    # no target counts for another but those that case alone tells apart
    assert len({verdict.extracted for verdict in verdicts}) == len({target.casefold() for target in targets})
