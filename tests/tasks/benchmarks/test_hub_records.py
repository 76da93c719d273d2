"""Every benchmark reads records in the hub's form, from the hub and from files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.tasks.benchmarks.records import HUB

from rlprior.config import RunError, UsageError
from rlprior.tasks.benchmarks.benchmark import Benchmark, load_benchmark
from rlprior.tasks.benchmarks.prompts import gold_letter
from rlprior.tasks.benchmarks.sources import Record, Source
from rlprior.tasks.benchmarks.suites import BENCHMARKS, SUITES
from rlprior.tasks.problem import LETTERS, Problem


def load(name: str, num_shots: int = 0, data_dir: Path | None = None) -> list[Problem]:
    return load_benchmark(BENCHMARKS[name], num_shots=num_shots, data_dir=data_dir)


def sources(benchmark: Benchmark) -> list[Source]:
    return [*benchmark.questions, *(benchmark.shots if isinstance(benchmark.shots, tuple) else ())]


def write_files(directory: Path, *benchmarks: Benchmark) -> None:
    contents: dict[Path, str] = {}
    splits = {(one.repo, one.subset, one.split): one for each in benchmarks for one in sources(each)}
    for (repo, subset, split), source in splits.items():
        path = directory / source.local_file()
        rows = HUB[repo][subset, split]
        contents[path] = contents.get(path, "") + "".join(json.dumps(row) + "\n" for row in rows)
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def files(example_files: Path) -> Path:
    """A data directory with a JSON Lines file of every source."""
    write_files(example_files, *BENCHMARKS.values())
    return example_files


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_and_files_give_the_same_problems(
    hub: Path, example_files: Path, tmp_path: Path, name: str
) -> None:
    benchmark = BENCHMARKS[name]
    num_shots = 1 if benchmark.shots != () else 0
    online = load(name, num_shots, example_files)
    write_files(example_files, benchmark)
    (tmp_path / "hub").rename(tmp_path / "gone")
    offline = load(name, num_shots, example_files)
    assert online == offline
    assert online
    assert len({problem.id for problem in online}) == len(online)


# what the first question of each asks, how its choices are scored or offered, its answer, and what a grader is told
EXPECTED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "gsm8k": ("Question: Add 999 and 1.\nAnswer:", (), "1000"),
    "math": ("Problem:\nHalve $5$ (algebra).\n\nSolution:", (), "2.5"),
    "math500": ("Problem:\nHalve $7$ (algebra).\n\nSolution:", (), "3.5"),
    "minerva": ("Problem:\nHow far is it, in cm?\n\nSolution:", (), "4.5e33"),
    "amc23": ("Problem:\nHow many hours?\n\nSolution:", (), "27"),
    "aime24": ("Problem:\nFind it.\n\nSolution:", (), "204"),
    "aime25": ("Problem:\nFind it too.\n\nSolution:", (), "70"),
    "olympiadbench": ("Problem:\nLet $x$ be real.\nSolve it.\n\nSolution:", (), "0.5"),
    "mmlu": (
        "Q: Is 2 prime?\n(A) no (B) yes (C) it was (D) so\nA: Let's think step by step.",
        ("no", "yes", "it was", "so"),
        "B",
    ),
    "mmlu_pro": (
        "Question:\nWhat is 5 plus two in law?\nOptions:\n"
        + "".join(f"{letter}. {5 + step}\n" for step, letter in enumerate(LETTERS[:10]))
        + "Answer: Let's think step by step.",
        tuple(str(5 + step) for step in range(10)),
        "C",
    ),
    "triviaqa": ("Question: Who wrote book 4?\nAnswer:", (), "J. Author 4"),
    "nq_open": ("Q: who painted wall 0?\nA:", (), "Painter 0"),
    "hellaswag": (
        "Making tea: Someone fills 2 pots of water. The water",
        (" boils.", " sings loudly.", " leaves.", "  Sleep"),  # as lm-evaluation-harness scores it
        "A",
    ),
    "siqa": ("Q: Kim lent 2 books. Why did Kim do this?\nA:", (" to help", " to sleep", " to swim"), "A"),
    "piqa": ("Question: Carry 2 eggs.\nAnswer:", (" Use a sieve of ice.", " Use a box."), "B"),
    "winogrande": ("", ("cups", "shelf"), "B"),
    "openbookqa": ("Ice 2 is", (" hot", " cold"), "B"),
    "commonsenseqa": (
        "Question: Where are 2 books?\nA. sea\nB. library\nC. oven\nD. sky\nE. soup\nAnswer:",
        (" A", " B", " C", " D", " E"),
        "B",
    ),
    "arc_easy": ("Question: Which of 2 things melts?\nAnswer:", (" ice", " stone", " smoke"), "A"),
    "arc_challenge": ("Question: Which of 2 things melts?\nAnswer:", (" ice", " stone", " smoke"), "A"),
    "bbh": ("Q: Is boolean_expressions hard?\nA: Let's think step by step.", (), "(A)"),
    "musr": (
        "A long story about murder_mysteries.\n\nWho is it?\n\n1 - Ann\n2 - Bob's\n\nAnswer:",
        (" Ann", " Bob's"),
        "B",
    ),
    "humaneval": ('def double(x):\n    """Twice x."""\n', (), "    return 2 * x\n"),
    "humanevalplus": ('def double(x):\n    """Twice x."""\n', (), "    return 2 * x\n"),
    "mbpp": (
        "Task: Write a function to add 11.\nThe code must pass:\nassert add_11(0) == 11\nassert add_11(1) == 12\n"
        "assert add_11(2) == 13\n[BEGIN]\n",
        (),
        "def add_11(x):\n  return x + 11",
    ),
    "mbppplus": (
        "Task: Write a function to double.\nThe code must pass:\nassert double(3) == 6\n[BEGIN]\n",
        (),
        "def double(x):\n  return 2 * x",
    ),
    "ifeval": (
        "Write about tea without commas, in at least 5 words.\n\n",
        (),
        "punctuation:no_comma, length_constraints:number_words",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_how_a_question_is_put(files: Path, name: str) -> None:
    benchmark = replace(BENCHMARKS[name], instruction="")
    problem = load_benchmark(benchmark, num_shots=0, data_dir=files)[0]
    assert (problem.prompt, problem.choices, problem.answer) == EXPECTED[name]


def test_shuffled_choices_keep_the_right_one_and_do_not_favour_a_place(files: Path) -> None:
    problems = load("gpqa", 0, files)
    for number, problem in enumerate(problems):
        assert problem.choices == (" (A)", " (B)", " (C)", " (D)")
        assert f"({problem.answer}) the one with {number}\n" in problem.prompt
        assert problem.group == ("Physics" if number % 2 else "Biology")
    truths = load("truthfulqa", 0, files)
    assert all(one.choices[LETTERS.index(one.answer)] == " Rarely" for one in truths)
    assert len({one.answer for one in (*problems, *truths)}) > 1
    assert problems == load("gpqa", 0, files)


def test_every_benchmark_of_every_suite_is_there_and_shown(files: Path) -> None:
    assert {entry.benchmark for suite in SUITES.values() for entry in suite.entries} == set(BENCHMARKS)
    assert set(BENCHMARKS) - set(EXPECTED) == {"gpqa", "gpqa_diamond", "truthfulqa"}


def test_what_graders_are_told(files: Path) -> None:
    assert load("triviaqa", 0, files)[0].reference == {"aliases": ["Author 4"]}
    assert load("nq_open", 0, files)[0].reference == {"aliases": ["P. 0"]}
    assert load("olympiadbench", 0, files)[1].reference == {"answers": ["0", "3"]}
    assert load("ifeval", 0, files)[0].reference["instructions"] == [
        {"id": "punctuation:no_comma", "arguments": {}},
        {"id": "length_constraints:number_words", "arguments": {"num_words": 5, "relation": "at least"}},
    ]
    plus, told = load("mbppplus", 0, files)[0].reference, load("humanevalplus", 0, files)[0].reference
    assert (plus["entry_point"], plus["inputs"][0], plus["tolerance"]) == ("double", [3], 1e-6)
    assert (told["inputs"], told["tolerance"], told["solution"]) == (
        plus["inputs"],
        1e-6,
        'def double(x):\n    """Twice x."""\n    return 2 * x\n',
    )


def test_shots_come_from_the_examples(files: Path) -> None:
    def opening(name: str, num_shots: int) -> str:
        problem = load(name, num_shots, files)[0]
        bare = load_benchmark(replace(BENCHMARKS[name], instruction=""), num_shots=0, data_dir=files)[0]
        assert problem.id == bare.id or BENCHMARKS[name].shots is None
        return problem.prompt.removesuffix(bare.prompt)

    assert opening("gsm8k", 2) == (
        "Question: Add 1 and 1.\nAnswer: 1+1=2\n#### 2\n\nQuestion: Add 2 and 1.\nAnswer: 2+1=3\n#### 3\n\n"
    )
    # the first of each of MATH's subjects before the second of any
    assert [
        subject for subject in ("algebra", "counting", "geometry") if subject in opening("math500", 2)
    ] == [
        "algebra",
        "counting",
    ]
    # those of the question's own category
    assert opening("mmlu_pro", 1).endswith(
        "Answer: Let's think step by step. 1 + 2 is C. The answer is (C).\n\n"
    )
    assert "law" in opening("mmlu_pro", 1)
    assert "physics" in load("mmlu_pro", 1, files)[1].prompt
    assert opening("commonsenseqa", 1).endswith("E. soup\nAnswer: B\n\n")
    assert opening("openbookqa", 1) == "Ice 1 is cold\n\n"
    assert opening("arc_challenge", 1) == "Question: Which of 1 things melts?\nAnswer: ice\n\n"
    assert opening("triviaqa", 1) == "Question: Who wrote book 1?\nAnswer: J. Author 1\n\n"
    # MBPP shows all tests of its tasks 2, 3 and 4; MBPP+ the first test of tasks that it does not ask
    assert opening("mbpp", 1).startswith(
        "Task: Write a function to add 2.\nThe code must pass:\nassert add_2(0) == 2\nassert"
    )
    assert opening("mbpp", 3).endswith("def add_4(x):\n  return x + 4\n[DONE]\n\n")
    assert [f"add {number}." in opening("mbppplus", 3) for number in (1, 2, 5, 10)] == [
        True,
        False,
        True,
        True,
    ]
    assert opening("bbh", 3).startswith("About boolean_expressions.\n\nQ: Is 1 even?\nA: Let's")
    assert opening("bbh", 1).count("Q: ") == 1
    assert opening("mmlu", 4).startswith("About number theory.\n\nQ: Is 0 odd?")
    assert opening("mmlu", 4).endswith("It is (B).\n\n")


def test_without_examples_the_instruction_shows_the_form(files: Path) -> None:
    assert r"\boxed{}" in load("gsm8k", 0, files)[0].prompt
    assert load("gsm8k", 0, files)[0].prompt.endswith("\n\nQuestion: Add 999 and 1.\nAnswer:")
    assert "questions about number theory." in load("mmlu", 0, files)[0].prompt


def test_the_first_questions_are_the_examples_where_there_are_no_others(files: Path) -> None:
    everything, asked = load("nq_open", 0, files), load("nq_open", 3, files)
    assert len(asked) == 1
    assert (
        asked[0].prompt
        == "".join(f"Q: who painted wall {number}?\nA: Painter {number}\n\n" for number in range(3))
        + "Q: who painted wall 3?\nA:"
    )
    assert asked[0].id == everything[3].id
    with pytest.raises(UsageError, match="nq_open: 4 shots of 4 questions leave none to ask"):
        load("nq_open", 4, files)


def test_winogrande_scores_one_continuation_after_two_contexts(files: Path) -> None:
    [problem] = load("winogrande", 1, files)
    opening = "The 1 cups did not fit on the shelf because the shelf was too small.\n\n"
    start = "The 2 cups did not fit on the shelf because the "
    assert problem.reference == {
        "contexts": [f"{opening}{start}cups", f"{opening}{start}shelf"],
        "continuation": " was too small.",
    }


def test_examples_that_are_not_there(files: Path) -> None:
    with pytest.raises(UsageError, match="ifeval: 3 shots asked for and 0 examples there; ask for fewer"):
        load("ifeval", 3, files)
    with pytest.raises(UsageError, match="mmlu_pro: 3 shots asked for and 2 examples there for 'law'"):
        load("mmlu_pro", 3, files)
    with pytest.raises(UsageError, match="mmlu: 5 shots asked for and 4 examples there for 'number_theory'"):
        load("mmlu", 5, files)
    (files / "mmlu" / "flan_cot_prompts.json").unlink()
    with pytest.raises(
        UsageError, match=r"flan_cot_prompts\.json: no such file; .* not on the hub: give --data-dir"
    ):
        load("mmlu", 4, files)
    (files / "bbh" / "cot-prompts" / "boolean_expressions.txt").unlink()
    with pytest.raises(UsageError, match=r"boolean_expressions\.txt: no such file; .*git clone https"):
        load("bbh", 3, files)


def test_data_that_are_nowhere_are_one_line_with_path_and_command(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(HUB, "openai/gsm8k")
    with pytest.raises(UsageError) as raised:
        load("gsm8k", 0, tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    assert "Couldn't reach 'openai/gsm8k' on the Hub" in message
    assert f"give --data-dir {tmp_path} with {tmp_path}/gsm8k/test.jsonl" in message
    assert f"hf download openai/gsm8k --repo-type dataset --local-dir {tmp_path}/gsm8k" in message


def test_a_download_in_the_hubs_layout_is_a_data_directory(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = load("arc_easy", 1)
    (hub / "allenai" / "ai2_arc").rename(tmp_path / "arc_easy")
    monkeypatch.delitem(HUB, "allenai/ai2_arc")
    assert load("arc_easy", 1, tmp_path) == online


BROKEN = [
    ("gsm8k", {"question": "?"}, UsageError, "no field 'answer'; it has 'question'"),
    ("gsm8k", {"question": "?", "answer": "none"}, RunError, "no gold answer"),
    ("gsm8k", {"question": ["?"], "answer": "#### 1"}, RunError, "'question' must be text, not list"),
    ("minerva", {"problem": "?", "solution": "It is 4."}, RunError, "no gold answer"),
    (
        "mmlu",
        {"subject": "s", "question": "?", "choices": ["a", "b"], "answer": 2},
        RunError,
        "'answer' must be one of A, B",
    ),
    ("mmlu", {"subject": "s", "question": "?", "choices": ["a", ""], "answer": 0}, RunError, "2 to 26 texts"),
    ("nq_open", {"question": "?", "answer": "a"}, RunError, "'answer' must be a list of texts"),
    ("nq_open", {"question": "?", "answer": []}, RunError, "'answer' must be a list of at least one text"),
    ("triviaqa", {"question": "?", "answer": "a"}, RunError, "'answer' must be an object with"),
    (
        "arc_easy",
        {"question": "?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"},
        RunError,
        "as many",
    ),
    (
        "winogrande",
        {"sentence": "No blank.", "option1": "a", "option2": "b", "answer": "1"},
        RunError,
        "with a blank",
    ),
    (
        "truthfulqa",
        {"question": "?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}},
        RunError,
        "one of them 1",
    ),
    ("truthfulqa", {"question": "?", "mc1_targets": ["a"]}, RunError, "one of them 1"),
    ("ifeval", {"prompt": "?", "instruction_id_list": ["a"], "kwargs": []}, RunError, "as many objects"),
]


@pytest.mark.parametrize(("name", "record", "error", "message"), BROKEN)
def test_a_broken_record_is_named_by_its_place(
    tmp_path: Path, name: str, record: dict[str, object], error: type[Exception], message: str
) -> None:
    path = tmp_path / BENCHMARKS[name].questions[0].local_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(error, match=f"{path}:1: .*{message}"):
        load(name, 0, tmp_path)


@pytest.mark.parametrize(
    ("value", "labels", "letter"),
    [(1, "12", "A"), (2, "12", "B"), ("2", "12", "B"), (1, "01", "B"), (1, "AB", "B"), ("B", "AB", "B")],
)
def test_a_number_is_the_label_of_that_name_or_else_a_position(
    value: int | str, labels: str, letter: str
) -> None:
    assert gold_letter(Record({"answer": value}, "here"), "answer", list(labels)) == letter
