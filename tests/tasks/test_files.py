"""Problems from files, and one clear line for every file that is not one."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path

import pytest

from rlprior.config import RunError, UsageError, decode
from rlprior.tasks.config import TaskConfig, load_task
from rlprior.tasks.files import load_problems, read_gold, read_gold_in_solution, read_json_lines
from rlprior.tasks.problem import Problem, Status
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


@pytest.mark.parametrize("answer", ["B", " b ", 1])
def test_multiple_choice_record(tmp_path: Path, answer: object) -> None:
    record = {"question": " Which is even? ", "choices": ["3", 4, " 5 "], "answer": answer, "subject": "sums"}
    [problem] = load_problems(write(tmp_path / "c.jsonl", record))
    assert problem.prompt == "Q: Which is even?\n(A) 3\n(B) 4\n(C) 5\nA:"
    assert (problem.solution, problem.answer, problem.choices) == (" #### B", "B", ("3", "4", "5"))
    assert verify(problem, problem.solution).status is Status.CORRECT


def test_one_question_with_other_choices_is_another_problem(tmp_path: Path) -> None:
    rows = [{"question": "Which?", "choices": ["1", last], "answer": "A"} for last in ("2", "3", "2")]
    assert len(load_problems(write(tmp_path / "c.jsonl", *rows))) == 2


def test_what_was_written_is_kept_beside_its_canonical_form(tmp_path: Path) -> None:
    rows = [
        {"problem": "Matrix?", "solution": r"\boxed{\begin{pmatrix} X \\ 2 \end{pmatrix}}"},
        {"problem": "Number?", "solution": r"\boxed{7}"},
    ]
    matrix, number = load_problems(write(tmp_path / "m.jsonl", *rows))
    assert matrix.written_answer == r"\begin{pmatrix} X \\ 2 \end{pmatrix}"
    assert number.written_answer is None


def test_an_answer_may_be_any_text_for_a_verifier_that_reads_more_than_numbers(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", {"question": "Say it", "answer": "(X, Y)"})

    def load(verifier: str) -> list[Problem]:
        config = TaskConfig(kind="file", path="p.jsonl", verifier=verifier)
        return load_task(config, split="train", num_problems=None, seed=0, data_dir=tmp_path)

    for verifier in ("math", "reward.py:f"):
        [problem] = load(verifier)
        assert (problem.answer, problem.written_answer) == ("(x,y)", "(X, Y)")
    with pytest.raises(RunError, match="no gold answer"):
        load("rules")


def test_files_that_are_part_of_a_task(tmp_path: Path) -> None:
    config = TaskConfig(kind="file", path="p.jsonl", verifier="r/reward.py:f")
    assert config.input_files(tmp_path) == {
        "problems": tmp_path / "p.jsonl",
        "reward": tmp_path / "r/reward.py",
    }
    assert config.input_files(None)["problems"] == Path("p.jsonl")
    assert TaskConfig(verifier="math").input_files(None) == {}


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
    *(
        (
            GOOD + json.dumps({"question": "q", "choices": ["1", "2"], "answer": "A", **change}).encode(),
            error,
            message,
        )
        for change, error, message in (
            (
                {"answer": "C"},
                RunError,
                r"p.jsonl:2: `answer` must be a letter from A to B, or a .* from 0 to 1 .*, not 'C'",
            ),
            ({"answer": 2}, RunError, r"p.jsonl:2: `answer` must be .*, not 2"),
            ({"answer": -1}, RunError, r"p.jsonl:2: `answer` must be .*, not -1"),
            ({"answer": True}, RunError, r"p.jsonl:2: `answer` must be .*, not True"),
            ({"answer": "1"}, RunError, r"p.jsonl:2: `answer` must be .*, not '1'"),
            ({"answer": ""}, RunError, r"p.jsonl:2: `answer` must be .*, not ''"),
            ({"choices": ["1"]}, RunError, r"p.jsonl:2: `choices` must be a list of 2 to 26 texts"),
            ({"choices": "12"}, RunError, r"p.jsonl:2: `choices` must be a list of 2 to 26 texts"),
            ({"choices": ["1", None]}, RunError, r"p.jsonl:2: `choices` must be text, not NoneType"),
            ({"question": ""}, RunError, r"p.jsonl:2: no question"),
        )
    ),
    (
        GOOD + b'{"question": "q", "choices": ["1", "2"]}\n',
        UsageError,
        r"p.jsonl:2: `choices` needs .*; add `answer`",
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


def test_mmlu_is_multiple_choice(real_data: Path) -> None:
    problems = load_problems(real_data / "mmlu" / "test.jsonl")
    # 14,042 rows, some of them twice
    assert 13_900 < len(problems) <= 14_042
    for problem in problems:
        assert verify(problem, problem.solution).status is Status.CORRECT
        named = f"the answer is ({problem.answer}) {problem.choices[ord(problem.answer) - ord('A')]}"
        # a choice that holds the end of a sentence or a line is cut there, and then is not that choice
        assert verify(problem, named).status in (Status.CORRECT, Status.UNPARSABLE)
        assert verify(problem, "Z").status is Status.UNPARSABLE


GOLD_TABLE = [
    (27.0, False, "27", None),
    (27, False, "27", None),
    (-0.25, False, "-0.25", None),
    ("27.0", False, "27", None),
    ("1,234", False, "1234", None),
    (r"$\frac{1}{2}$", False, "0.5", None),
    (r"\$1{,}200", False, "1200", None),
    ("(1,2)", False, "(1,2)", None),
    (
        "2, 5",
        False,
        "2,5",
        None,
    ),  # one answer that is a list: only the benchmark knows whether its order counts
    (["$3$"], False, "3", None),
    (["5", "$2$"], False, "2, 5", ["5", "2"]),
    ("$5,2$", True, "2, 5", ["5", "2"]),
    ("$100,200$", True, "100, 200", ["100", "200"]),
    ("$1{,}100$, $7$", True, "1100, 7", ["1,100", "7"]),
    (["$(1,2)$, $(2, 1)$"], True, "(1,2), (2,1)", ["(1, 2)", "(2, 1)"]),
    (r"\{1, 2\}", True, "1, 2", ["1", "2"]),
    (r"$\pm 2$", True, "-2, 2", [r"\pm 2"]),
]


@pytest.mark.parametrize(("value", "several", "answer", "answers"), GOLD_TABLE)
def test_gold_answers_as_benchmarks_write_them(
    value: object, several: bool, answer: str, answers: list[str] | None
) -> None:
    gold = read_gold(value, "b.jsonl:1", several=several)
    assert gold.answer == answer
    assert gold.reference == (None if answers is None else {"answers": answers})
    one = Problem(id="0", task="t", difficulty=0, prompt="", solution="", **dataclasses.asdict(gold))
    assert verify(one, rf"\boxed{{{gold.written_answer}}}").status is Status.CORRECT


@pytest.mark.parametrize(
    "value",
    [None, True, "", "  ", "$$", [], [""], ["1", None], {"a": 1}, float("nan"), float("inf"), [["1"]]],
)
def test_what_is_no_gold_answer_is_refused_with_file_and_line(value: object) -> None:
    with pytest.raises(RunError, match=r"^b\.jsonl:7: no gold answer; it must be a number"):
        read_gold(value, "b.jsonl:7")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"First \boxed{1}, then \boxed{\frac{2}{4}}.", "0.5"),
        (r"Hence $\boxed 2$.", "2"),
        (r"Hence \boxed 17.", "17"),
        (r"so \fbox{3}", "3"),
        (r"so $\boxed{\text{Evelyn}}$", "evelyn"),
    ],
)
def test_the_gold_answer_of_a_solution_is_its_last_box(solution: str, answer: str) -> None:
    assert read_gold_in_solution(solution, "m.jsonl:1").answer == answer


@pytest.mark.parametrize("solution", ["", "The answer is 5.", r"\boxed{}", r"\boxed{5"])
def test_a_solution_without_a_box_is_refused(solution: str) -> None:
    with pytest.raises(RunError, match=r"^m\.jsonl:9: no gold answer; "):
        read_gold_in_solution(solution, "m.jsonl:9")
