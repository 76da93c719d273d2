"""Problems from files, and one clear line for every file that is not one."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from rlprior.config import RunError, UsageError, decode
from rlprior.tasks.config import TaskConfig, load_task
from rlprior.tasks.files import load_problems, read_json_lines
from rlprior.tasks.problem import Status
from rlprior.tasks.verify import verify


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_gsm8k_record(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl",
        {"question": " How many? ", "answer": "He has 48/2 = <<48/2=24>>24.\nSo 1,200 in all.\n#### 1,200"},
    )
    [problem] = load_problems(path)
    assert problem.prompt == "Q: How many?\nA:"
    assert problem.solution == " He has 48/2 = 24.\nSo 1,200 in all.\n#### 1200"
    assert (problem.answer, problem.difficulty) == ("1200", 0)
    assert verify(problem, problem.solution).status is Status.CORRECT


def test_math_record(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.jsonl", {"problem": "Half?", "solution": r"It is \boxed{\frac{1}{2}}.", "level": 3}
    )
    [problem] = load_problems(path)
    assert problem.answer == "0.5"
    assert problem.solution.endswith("#### 0.5")
    assert verify(problem, problem.solution).status is Status.CORRECT


@pytest.mark.parametrize("answer", [27.0, "27", 27, "27.0"])
def test_bare_numbers_are_gold_answers(tmp_path: Path, answer: object) -> None:
    [problem] = load_problems(write(tmp_path / "amc.jsonl", {"question": "?", "answer": answer}))
    assert (problem.solution, problem.answer) == (" #### 27", "27")


def test_file_order_blank_lines_copies_compression_and_byte_order_mark(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in (3, 1, 2, 1)]
    content = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows)
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(content.encode("utf-8")))
    assert [problem.answer for problem in load_problems(path)] == ["3", "1", "2"]


GOOD = b'{"question": "1+1", "answer": "#### 2"}\n'
BAD_FILES = [
    (b"", RunError, r"p.jsonl: the file is empty"),
    (b"\n \n", RunError, r"p.jsonl: the file is empty"),
    (GOOD + b'{"question": "1+1", "answer"\n', RunError, r"p.jsonl:2: not JSON \("),
    (GOOD + b"[" * 100_000 + b"\n", RunError, r"p.jsonl:2: not JSON \(nested too deeply\)"),
    (GOOD + b"[1]\n", RunError, r"p.jsonl:2: not a JSON object"),
    (GOOD + b'{"question": "\xff"}\n', RunError, rf"p.jsonl: byte {len(GOOD) + 14} is not UTF-8"),
    (
        GOOD + b'{"question": "1+1"}\n',
        UsageError,
        r"p.jsonl:2: needs `question` and `answer`, .*; it has question",
    ),
    (GOOD + b"{}\n", UsageError, r"p.jsonl:2: needs .*; it has nothing"),
    (GOOD + b'{"question": "q", "answer": "two"}\n', RunError, r"p.jsonl:2: no gold answer"),
    (GOOD + b'{"question": "q", "answer": "two ####"}\n', RunError, r"p.jsonl:2: no gold answer"),
    (GOOD + b'{"problem": "q", "solution": "It is 2."}\n', RunError, r"p.jsonl:2: no gold answer"),
    (GOOD + b'{"problem": "q", "solution": "\\\\boxed{2"}\n', RunError, r"p.jsonl:2: no gold answer"),
    (GOOD + b'{"question": " ", "answer": "#### 2"}\n', RunError, r"p.jsonl:2: no question"),
    (
        GOOD + b'{"question": "q", "answer": null}\n',
        RunError,
        r"p.jsonl:2: `answer` must be text, not NoneType",
    ),
    (GOOD + b'{"question": "q", "answer": true}\n', RunError, r"p.jsonl:2: `answer` must be text, not bool"),
    (
        GOOD + b'{"question": "\\ud800", "answer": "#### 2"}\n',
        RunError,
        r"p.jsonl:2: character 0 is half a surrogate",
    ),
]


@pytest.mark.parametrize(("content", "error", "message"), BAD_FILES)
def test_bad_files(tmp_path: Path, content: bytes, error: type[Exception], message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        load_problems(path)
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.jsonl: no such file"):
        load_problems(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("cut", [5, 40])
def test_damaged_archive(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 100)[:cut])
    with pytest.raises(RunError, match=r"p\.jsonl\.gz: cannot be read"):
        list(read_json_lines(path))
    path.write_bytes(GOOD)
    with pytest.raises(RunError, match=r"p\.jsonl\.gz: cannot be read"):
        list(read_json_lines(path))


def test_load_task_takes_the_first_rows_of_a_file(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", *({"question": f"q{i}", "answer": f"#### {i}"} for i in range(5)))
    config = TaskConfig(kind="file", path="p.jsonl", limit=4)

    def answers(num_problems: int | None) -> list[str]:
        problems = load_task(config, split="test", num_problems=num_problems, seed=0, data_dir=tmp_path)
        return [problem.answer for problem in problems]

    assert answers(2) == ["0", "1"]
    assert answers(None) == answers(100) == ["0", "1", "2", "3"]


def test_load_task_generates_the_side_asked_for() -> None:
    config = TaskConfig(families=("addition",), difficulties=(2,), limit=7)
    problems = load_task(config, split="test", num_problems=20, seed=0, data_dir=None)
    assert len(problems) == 7
    assert problems == load_task(config, split="test", num_problems=None, seed=0, data_dir=None)
    unlimited = TaskConfig()
    with pytest.raises(UsageError, match="num_problems or limit"):
        load_task(unlimited, split="test", num_problems=None, seed=0, data_dir=None)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "file"}, "task: path is missing"),
        ({"path": "p.jsonl"}, "task: path is for kind = 'file'"),
        ({"families": ["divison"]}, "task: family 'divison' is unknown"),
        ({"difficulties": [0]}, "task: difficulty 0 is unknown"),
        ({"limit": 0}, "task: limit = 0 must be at least 1"),
        ({"famlies": ["addition"]}, "unknown key 'task.famlies'; did you mean 'families'?"),
    ],
)
def test_bad_config(table: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        decode(TaskConfig, table, source="study.toml", where="task")


@pytest.mark.parametrize(("side", "num_problems"), [("train", 7473), ("test", 1319)])
def test_gsm8k_gold_solutions_are_judged_correct(real_data: Path, side: str, num_problems: int) -> None:
    problems = load_problems(real_data / "gsm8k" / f"{side}.jsonl")
    assert len(problems) == num_problems
    assert not any("<<" in problem.solution for problem in problems)
    assert all(verify(problem, problem.solution).status is Status.CORRECT for problem in problems)
