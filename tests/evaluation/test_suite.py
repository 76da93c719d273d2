"""A suite on a small model: what is asked and missing, killed and grown, and what its table says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.small_study import Killed, command, crash_on_call, environment, last_checkpoint

from rlprior.cli import main
from rlprior.evaluation import suite as suite_module
from rlprior.evaluation.compare import Metric, compare_evaluations, read_evaluation
from rlprior.reports.suite_table import describe_results
from rlprior.runs import identity
from rlprior.sampling import answers as answers_module
from rlprior.tasks import verifier as verifier_module
from rlprior.tasks.benchmarks.suites import BENCHMARKS

QUESTIONS = [("How many are 2 and 3?", 5), ("How many are 4 and 4?", 8), ("How many are 6 and 1?", 7)]


@pytest.fixture(scope="module")
def model(trained: Path) -> Path:
    """A small model's Hugging Face folder."""
    return last_checkpoint(trained)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GSM8K and OpenBookQA with a handful of questions in their own formats."""
    root = tmp_path_factory.mktemp("data")
    gsm8k = [{"question": text, "answer": f"It is {answer}.\n#### {answer}"} for text, answer in QUESTIONS]
    for name, split in (("gsm8k", "test"), ("gsm8k", "train")):
        (root / name).mkdir(exist_ok=True)
        (root / name / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in gsm8k * 2))
    choices = {"label": ["A", "B"], "text": ["a fish", "a stone"]}
    lines = [
        {"question_stem": stem, "choices": choices, "answerKey": key}
        for stem, key in (("What swims?", "A"), ("What sinks?", "B"), ("What eats?", "A"))
    ]
    (root / "openbookqa").mkdir()
    for split in ("test", "train"):
        (root / "openbookqa" / f"{split}.jsonl").write_text(
            "".join(json.dumps(one) + "\n" for one in lines * 2)
        )
    return root


def evaluate(model: Path, out: Path, data_dir: Path, *options: str, samples: int = 4) -> int:
    return main([str(one) for one in arguments(model, out, data_dir, *options, samples=samples)])


def arguments(
    model: Path, out: Path, data_dir: Path, *options: str, samples: int = 4
) -> Sequence[str | Path]:
    names = (
        ()
        if "--benchmarks" in options or "--skip-missing" in options
        else ("--benchmarks", "gsm8k", "openbookqa")
    )
    return [
        *("evaluate", model, "--suite", "paper-base", "--data-dir", data_dir, "--out", out),
        *("--samples", str(samples), "--max_new_tokens=6", *names, *options),
    ]


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_each_benchmark_by_its_own_metric(
    model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model, tmp_path / "out", data_dir) == 0
    results = results_of(tmp_path / "out")
    gsm8k, openbookqa = (results["benchmarks"][name] for name in ("gsm8k", "openbookqa"))
    assert (gsm8k["metric"], gsm8k["num_samples"], gsm8k["num_shots"]) == ("sampled", 4, 4)
    assert (openbookqa["metric"], openbookqa["num_samples"], openbookqa["num_shots"]) == ("likelihood", 1, 5)
    assert len(gsm8k["num_correct"]) == len(openbookqa["num_correct"]) == 6
    assert set(openbookqa["num_correct"]) <= {0, 1}
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "results.md").read_text().strip() in printed
    assert "| Mathematics" in printed
    assert "- No average: each needs benchmarks" in printed  # seventeen benchmarks are missing


def test_the_limit_of_a_benchmark_is_written_down(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = dataclasses.replace(BENCHMARKS["gsm8k"], max_new_tokens=7)
    monkeypatch.setitem(BENCHMARKS, "gsm8k", limited)
    for name, limit in (("a", ""), ("b", "--max_new_tokens=6")):
        options = ["--samples", "1", "--benchmarks", "gsm8k", *([limit] if limit else [])]
        paths = [str(one) for one in (model, "--suite", "paper-base", "--data-dir", data_dir)]
        assert main(["evaluate", *paths, "--out", str(tmp_path / name), *options]) == 0
    own, given = (read_evaluation(tmp_path / name) for name in "ab")
    notes = compare_evaluations(own, given, Metric("avg")).notes
    assert any("max_new_tokens is 7 in A and 6 in B" in note for note in notes)


def test_a_suite_grows(model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_drawn: list[int] = []
    original = answers_module.sample

    def count(*args: Any, **options: Any) -> Any:
        num_drawn.append(sum(map(len, options["generators"])))
        return original(*args, **options)

    monkeypatch.setattr(answers_module, "sample", count)
    grown, at_once = tmp_path / "grown", tmp_path / "once"
    evaluate(model, grown, data_dir, "--max-questions", "2")
    evaluate(model, grown, data_dir, "--max-questions", "2")  # nothing is left to do
    assert sum(num_drawn) == 2 * 4
    assert len(results_of(grown)["benchmarks"]["gsm8k"]["num_correct"]) == 2
    evaluate(model, grown, data_dir, "--max-questions", "4", samples=16)
    assert sum(num_drawn) == 4 * 16
    evaluate(model, at_once, data_dir, "--max-questions", "4", samples=16)
    assert results_of(grown) == results_of(at_once)
    evaluate(model, grown, data_dir, "--max-questions", "2")  # less again
    assert sum(num_drawn) == 2 * 4 * 16
    assert results_of(grown)["benchmarks"]["gsm8k"]["num_samples"] == 4


@pytest.mark.parametrize("where", ["answer_problems", "score_choices", "write_json"])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_changes_no_number(
    model: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    after: bool,
) -> None:
    evaluate(model, tmp_path / "whole", data_dir)
    with monkeypatch.context() as patch:
        patch.setattr(suite_module, where, crash_on_call(1, after, getattr(suite_module, where)))
        with pytest.raises(Killed):
            evaluate(model, tmp_path / "crashed", data_dir)
    assert evaluate(model, tmp_path / "crashed", data_dir) == 0
    for name in ("results.json", "results.md", "samples/gsm8k.jsonl", "choices/openbookqa.json"):
        assert (tmp_path / "crashed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_corrected_gold_answer_counts(model: Path, data_dir: Path, tmp_path: Path) -> None:
    corrected = tmp_path / "data"
    shutil.copytree(data_dir, corrected)
    out, options = tmp_path / "out", ("--benchmarks", "openbookqa")
    assert evaluate(model, out, corrected, *options) == 0
    before = results_of(out)["benchmarks"]["openbookqa"]["num_correct"]
    path = corrected / "openbookqa" / "test.jsonl"
    swapped = str.maketrans("AB", "BA")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["answerKey"] = record["answerKey"].translate(swapped)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "result.json").unlink()  # killed before its end
    assert evaluate(model, out, corrected, *options) == 0
    assert results_of(out)["benchmarks"]["openbookqa"]["num_correct"] == [1 - one for one in before]


def test_a_changed_grader_grades_anew_and_draws_nothing(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, grades = tmp_path / "out", tmp_path / "out" / "samples" / "gsm8k.grades.jsonl"
    assert evaluate(model, out, data_dir) == 0
    samples, before = (out / "samples" / "gsm8k.jsonl").read_bytes(), grades.read_text().splitlines()
    original = identity.code_fingerprint

    def changed(packages: Sequence[str]) -> str:
        return original(packages) + "+" * any(name.startswith("rlprior.tasks") for name in packages)

    for module in (identity, suite_module, verifier_module):
        monkeypatch.setattr(module, "code_fingerprint", changed)
    monkeypatch.setattr(answers_module, "sample", None)
    assert evaluate(model, out, data_dir) == 0
    assert (out / "samples" / "gsm8k.jsonl").read_bytes() == samples
    after = grades.read_text().splitlines()
    assert after[0] != before[0]  # which names the grader
    assert after[1:] == before[1:]


@pytest.mark.slow
def test_killed_at_random_it_ends_in_the_same_table(model: Path, data_dir: Path, tmp_path: Path) -> None:
    evaluate(model, tmp_path / "whole", data_dir, samples=64)
    crashed, num_kills = tmp_path / "killed", 0
    for seconds in (2.0, 3.0, 3.5, 4.0, 4.5, 5.0):
        process = subprocess.Popen(
            command(*arguments(model, crashed, data_dir, samples=64)),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_kills += 1
    assert num_kills
    assert evaluate(model, crashed, data_dir, samples=64) == 0
    assert results_of(crashed) == results_of(tmp_path / "whole")


def test_what_is_missing_is_told_before_anything_is_asked(
    model: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(suite_module, "_load", None)
    assert evaluate(model, tmp_path / "out", data_dir, "--benchmarks", "gsm8k", "mmlu") == 2
    message = capsys.readouterr().err
    assert "1 of 2 benchmarks cannot be asked" in message
    assert "cais/mmlu" in message
    assert "--skip-missing" in message


def test_a_limit_without_room_for_prompts_is_told_before_anything_is_asked(
    model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(model, out, data_dir, "--max_new_tokens=4096") == 1
    assert "max_new_tokens = 4096 leaves no room for a prompt" in capsys.readouterr().err
    assert not (out / "choices").exists()  # of the benchmark that comes first and needs no room


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "paper"), "suite = 'paper' is unknown; write paper-base"),
        (("--suite", "paper-rl", "--benchmarks", "gsm8k"), "paper-rl has no benchmark 'gsm8k'"),
        (("--suite", "paper-rl", "--samples", "0"), "--samples: must be a whole number from 1 on"),
        (("--suite", "paper-rl", "--max-new-tokens", "9"), "write --max_new_tokens=value"),
        (("--suite", "paper-rl", "--temperature=0"), "temperature must be above 0"),
        (("--config", "evaluate.toml", "--samples", "3"), "--samples is for --suite"),
        ((), "one of the arguments --suite --config is required"),
    ],
)
def test_mistakes(
    model: Path, options: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(model), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_table_by_hand() -> None:
    sampled = {
        "title": "GSM8K",
        "category": "Mathematics",
        "metric": "sampled",
        "num_shots": 4,
        "num_samples": 4,
        "num_correct": [4, 0, 1, 1],
        "consensus": [1.0, 0.0, 0.5, 0.5],
        "num_truncated": [0, 2, 0, 0],
        "num_unparsable": [0, 1, 0, 0],
    }
    likelihood = {
        "title": "PIQA",
        "category": "Commonsense Reasoning",
        "metric": "likelihood",
        "num_shots": 0,
        "num_samples": 1,
        "num_correct": [1, 0, 1, 0],
    }
    text = describe_results(
        {
            "suite": "paper-base",
            "model": "m",
            "decoding": {"temperature": 0.7, "top_p": 0.95},
            "missing": {"mmlu": "no such file"},
            "benchmarks": {"gsm8k": sampled, "piqa": likelihood},
        }
    )
    rows = {
        cells[2].strip(): [cell.strip() for cell in cells]
        for line in text.splitlines()
        if len(cells := line.split("|")) > 3
    }
    assert rows["GSM8K"][5].startswith("37.5 (")
    assert rows["GSM8K"][6:10] == ["75.0 @4", "50.0 @4", "12.5%", "6.2%"]
    assert rows["PIQA"][5].startswith("50.0 (")
    assert rows["PIQA"][6:10] == ["", "", "", ""]
    assert "Not asked for want of data: MMLU;" in text


def test_what_counts_as_wrong_without_an_answer_is_said() -> None:
    results: dict[str, Any] = {
        "suite": "paper-base",
        "model": "m",
        "decoding": {"temperature": 0.7, "top_p": 0.95},
        "missing": {},
        "benchmarks": {
            "math500": {
                "title": "MATH-500",
                "category": "Mathematics",
                "metric": "sampled",
                "num_shots": 4,
                "num_samples": 4,
                "num_correct": [4, 0],
                "consensus": [1.0, 0.0],
                "num_truncated": [0, 0],
                "num_unparsable": [0, 0],
                "num_timed_out": [0, 3],
                "num_failed": [0, 0],
                "num_cut": [0, 1],
            }
        },
    }
    text = describe_results(results)
    assert "MATH-500: 3 of 8 answers timed out and count as wrong." in text
    assert "failed" not in text
    assert "MATH-500: 1 of 2 prompts lost their beginning, for want of positions in the model." in text


@pytest.mark.parametrize("num_samples", [128, 8])
def test_averages_count_pass_at_k_as_the_papers(num_samples: int) -> None:
    def benchmark(num_samples: int, num_correct: list[int]) -> dict[str, Any]:
        return {
            "title": "T",
            "category": "C",
            "metric": "sampled",
            "num_shots": 0,
            "num_samples": num_samples,
            "num_correct": num_correct,
            "consensus": [],
            "num_truncated": [0],
            "num_unparsable": [0],
        }

    text = describe_results(
        {
            "suite": "paper-base",
            "model": "m",
            "decoding": {"temperature": 0.7, "top_p": 0.95},
            "missing": {},
            "benchmarks": {
                "humanevalplus": benchmark(128, [1, 0]),  # Pass@64 of one in 128 is 0.5
                "mbppplus": benchmark(num_samples, [num_samples, num_samples]),
            },
        }
    )
    assert "- Coding: 62.50" in text
    assert f"count Pass@{min(64, num_samples)} of T, T" in text


def test_changed_data_is_asked_anew(model: Path, data_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(data_dir, root)
    evaluate(model, tmp_path / "out", root, "--benchmarks", "openbookqa")
    before = results_of(tmp_path / "out")["benchmarks"]["openbookqa"]["num_correct"]
    path = root / "openbookqa" / "test.jsonl"
    swapped = [json.loads(line) for line in path.read_text().splitlines()]
    for record in swapped:
        record["answerKey"] = {"A": "B", "B": "A"}[record["answerKey"]]
    path.write_text("".join(json.dumps(record) + "\n" for record in swapped))
    evaluate(model, tmp_path / "out", root, "--benchmarks", "openbookqa")
    after = results_of(tmp_path / "out")["benchmarks"]["openbookqa"]["num_correct"]
    assert [one + other for one, other in zip(before, after, strict=True)] == [1] * len(before)


def test_a_command_that_is_refused_claims_no_folder(model: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate(model, out, data_dir, "--benchmarks", "gsm8k", "mmlu") == 2
    assert evaluate(data_dir, out, data_dir) == 2
    assert not out.exists()


def test_a_dry_run_says_what_there_is_to_ask(
    model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model, tmp_path / "out", data_dir, "--dry-run") == 0
    assert "2 benchmarks, 12 questions, 30 answers" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
