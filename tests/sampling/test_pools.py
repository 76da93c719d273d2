"""Stores with what lies beside them, and the same samples as a table."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from tests.evaluation.sampled_run import GRADER, KEY, Answer, question, write_pool

from rlprior.config import RunError, UsageError
from rlprior.sampling.grades import grades_of
from rlprior.sampling.pools import UNGRADED, Pool, find_stores, questions_of, read_pool, write_parquet

ANSWERS = {
    "b": [
        Answer(" 4", "correct", "4", second_status="wrong"),
        Answer(" 5", "wrong", "5", second_status="wrong"),
        Answer(" 2+2 =", "truncated"),
    ],
    "a": [Answer(" hm", None, token_ids=())],
}
QUESTIONS = {"a": question("Q: 1+3\nA:", group="small"), "b": question("Q: 2+2\nA:")}


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return read_pool(write_pool(tmp_path, "sums-00000040", ANSWERS, QUESTIONS))


def test_samples_questions_and_grades_come_together(pool: Pool) -> None:
    assert (pool.task, pool.step, pool.grader, pool.decoding) == ("sums", 40, GRADER, KEY.decoding)
    assert pool.questions == QUESTIONS
    assert list(pool.answers) == ["b", "a"]
    found = [(one.sample.text, one.status, one.is_truncated, one.is_disputed) for one in pool.samples]
    assert found == [
        (" 4", "correct", False, True),
        (" 5", "wrong", False, False),
        (" 2+2 =", "truncated", True, False),
        (" hm", UNGRADED, False, False),
    ]


def test_samples_are_in_the_order_of_their_indices(tmp_path: Path) -> None:
    """A pool that was filled up has the later samples of a problem in later lines, in any order."""
    path = write_pool(tmp_path, "sums", {"a": [Answer("0"), Answer("1")], "b": [Answer("2"), Answer("3")]})
    header, first, second = path.read_text().splitlines()
    swapped = first.replace('"sample_index": 0', '"sample_index": 9')
    path.write_text("\n".join([header, swapped, second]) + "\n")
    pool = read_pool(path)
    assert [one.sample.sample_index for one in pool.answers["a"]] == [1, 9]
    assert pool.step is None


def test_what_is_not_there_yet_is_left_open(tmp_path: Path) -> None:
    path = write_pool(tmp_path, "sums", ANSWERS)
    grades_of(path).unlink()
    with path.open("a") as file:
        file.write('{"samples": [{"problem_id": "torn')
    pool = read_pool(path)
    assert (pool.grader, pool.questions, len(list(pool.samples))) == (None, {}, 4)
    assert {one.status for one in pool.samples} == {UNGRADED}


@pytest.mark.parametrize("beside", [grades_of, questions_of])
@pytest.mark.parametrize("line", ["{", "[1]", '{"num_grades": 1, "grader": "x"}\n{"id": 1}'])
def test_damage_is_told_by_file(tmp_path: Path, beside: Any, line: str) -> None:
    path = write_pool(tmp_path, "sums", ANSWERS, QUESTIONS)
    beside(path).write_text(line + "\n")
    with pytest.raises(RunError, match=rf"{beside(path).name}: not a file of (grades|questions), or damaged"):
        read_pool(path)


def test_stores_are_found_by_task(tmp_path: Path) -> None:
    paths = [
        write_pool(tmp_path, name, ANSWERS, QUESTIONS) for name in ("sums-00000040", "sums-00000080", "words")
    ]
    assert find_stores(tmp_path) == find_stores(tmp_path / "samples") == paths
    assert find_stores(tmp_path, ["sums"]) == paths[:2]
    with pytest.raises(UsageError, match=r"no samples of 'sum'; there are sums, words"):
        find_stores(tmp_path, ["words", "sum"])


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        find_stores(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"no samples/\*.jsonl there; give the folder of an evaluation"):
        find_stores(tmp_path)
    write_pool(tmp_path / "runs" / "evaluate-ce", "sums", ANSWERS)
    with pytest.raises(
        UsageError, match=r"this is a study; give one of its evaluations, such as .*evaluate-ce"
    ):
        find_stores(tmp_path)


def test_the_table_holds_every_sample(pool: Pool, tmp_path: Path) -> None:
    other = read_pool(write_pool(tmp_path, "words", {"w": [Answer(" x", token_ids=(2**31 - 1,))]}))
    path = tmp_path / "all.parquet"
    assert write_parquet([pool, other], path) == 5
    rows = parquet.read_table(path).to_pylist()
    first, last = rows[0], rows[4]
    assert first == {
        "task": "sums",
        "step": 40,
        "problem_id": "b",
        "group": "",
        "prompt": "Q: 2+2\nA:",
        "answer": "4",
        "sample_index": 0,
        "text": " 4",
        "token_ids": [5, 6, 7],
        "num_tokens": 3,
        "finish_reason": "stop",
        "log_prob_nats": -1.5,
        "status": "correct",
        "extracted": "4",
        "second_status": "wrong",
        "disputed": True,
    }
    assert [row["status"] for row in rows] == ["correct", "wrong", "truncated", None, "wrong"]
    assert (rows[3]["group"], rows[3]["token_ids"], rows[3]["disputed"]) == ("small", [], None)
    assert (last["step"], last["prompt"], last["token_ids"]) == (None, None, [2**31 - 1])
    assert parquet.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    pool = read_pool(
        write_pool(
            tmp_path,
            "x",
            {"p": [Answer("\ud83d\ude00 \ud83d", "wrong", "\udc00")]},
            {"p": question("\ud800")},
        )
    )
    write_parquet([pool], tmp_path / "x.parquet")
    (row,) = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert (row["text"], row["extracted"], row["prompt"]) == ("\U0001f600 \ufffd", "\ufffd", "\ufffd")


def test_a_table_is_written_whole_or_not_at_all(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "table" / "all.parquet"
    path.parent.mkdir()
    write_parquet([pool], path)
    before = path.read_bytes()
    too_large = read_pool(write_pool(tmp_path, "bad", {"w": [Answer("x", token_ids=(2**31,))]}))
    with pytest.raises(Exception, match="int"):
        write_parquet([pool, too_large], path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_pyarrow_is_asked_for_in_one_line(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'rlprior\[parquet\]'"):
        write_parquet([pool], tmp_path / "all.parquet")
    assert not (tmp_path / "all.parquet").exists()


def test_numbers_of_the_table_are_numbers(pool: Pool, tmp_path: Path) -> None:
    write_parquet([pool], tmp_path / "all.parquet")
    kinds = {field.name: str(field.type) for field in parquet.read_schema(tmp_path / "all.parquet")}
    assert kinds["step"] == kinds["sample_index"] == kinds["num_tokens"] == "int64"
    assert kinds["log_prob_nats"] == "double"
    assert kinds["token_ids"].startswith("list<")
    assert math.isfinite(parquet.read_table(tmp_path / "all.parquet")["log_prob_nats"][0].as_py())
