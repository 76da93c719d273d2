"""Hand-made tables of answers, by the rules alone and with math-verify: which are the gold answer, which are not, which are none."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.tasks.test_verify import CHOICES

from rlprior.tasks.canonical import canonical_answer, canonical_answers
from rlprior.tasks.config import TaskConfig
from rlprior.tasks.problem import Problem, Status, Verdict
from rlprior.tasks.verifier import RULES, open_verifier

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "tasks.md"
SIGNS = {Status.CORRECT: "=", Status.WRONG: "x", Status.UNPARSABLE: "-"}


@dataclass(frozen=True)
class Row:
    """One line of a table; `is_limit`: the outcome of one grader or of both is known not to be the truth."""

    where: str
    group: str
    truth: str
    rules: str
    both: str
    gold: str
    response: str

    @property
    def is_limit(self) -> bool:
        return self.group.startswith("limit: ")

    @property
    def graded(self) -> tuple[Problem, str, bool]:
        golds = self.gold.split(" | ")
        choice = self.gold.removeprefix("choice ") if self.gold.startswith("choice ") else None
        posed = Problem(
            id=self.where,
            task="t",
            difficulty=0,
            prompt="",
            solution="",
            answer=choice or (canonical_answers(golds) if len(golds) > 1 else canonical_answer(self.gold)),
            written_answer=", ".join(golds),
            choices=CHOICES if choice else (),
            reference={"answers": golds} if len(golds) > 1 else None,
        )
        return posed, self.response, False


def read_rows(name: str) -> list[Row]:
    rows, group = [], ""
    for number, line in enumerate((HERE / name).read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#"):
            group = line.removeprefix("# ")
            continue
        truth, rules, both, gold, answer = line.split("\t")
        boxed = name == "equivalence.tsv"
        response = rf"\boxed{{{answer}}}" if boxed else answer.replace("\u23ce", "\n")
        rows.append(Row(f"{name}:{number}", group, truth, rules, both, gold, response))
    return rows


ROWS = read_rows("equivalence.tsv") + read_rows("extraction.tsv")


def signs(verdicts: list[Verdict]) -> dict[str, str]:
    return {row.where: SIGNS[verdict.status] for row, verdict in zip(ROWS, verdicts, strict=True)}


def test_the_tables_have_enough_rows_of_each_kind() -> None:
    counts = Counter(row.truth for row in ROWS)
    assert counts["="] >= 150
    assert counts["x"] >= 150
    assert counts["-"] >= 20
    assert len({(row.gold, row.response) for row in ROWS}) == len(ROWS)


def test_what_is_no_limit_is_true() -> None:
    """The rules alone may miss what has to be computed; what they call correct is."""
    for row in ROWS:
        is_true = row.both == row.truth and (row.rules == row.truth or (row.truth, row.rules) == ("=", "x"))
        assert is_true != row.is_limit, row


def test_every_limit_is_documented() -> None:
    documented = " ".join(DOCS.read_text(encoding="utf-8").split())
    limits = {row.group.removeprefix("limit: ") for row in ROWS if row.is_limit}
    assert limits
    assert [limit for limit in limits if limit not in documented] == []


def test_the_rules_alone() -> None:
    assert signs(RULES.grade([row.graded for row in ROWS])) == {row.where: row.rules for row in ROWS}


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_the_rules_and_math_verify() -> None:
    # the deadline is for the loaded machine that tests run on: a comparison takes milliseconds
    with open_verifier(TaskConfig(verifier="math", verifier_timeout_seconds=20.0), None) as verifier:
        verdicts = verifier.grade([row.graded for row in ROWS])
    assert signs(verdicts) == {row.where: row.both for row in ROWS}
    rules = RULES.grade([row.graded for row in ROWS])
    for row, verdict, ruled in zip(ROWS, verdicts, rules, strict=True):
        # a second verdict is the other grader's: where it differs, one of the two is the rules'
        if verdict.second_status not in (None, verdict.status):
            assert ruled.status in (verdict.status, verdict.second_status), row
