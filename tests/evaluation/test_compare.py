"""Two evaluations compared: pairing, what is refused or said, words that follow from numbers, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.small_study import last_checkpoint, study_tables, write_toml

from rlprior.cli import main
from rlprior.config import UsageError
from rlprior.evaluation.compare import (
    Comparison,
    Metric,
    as_data,
    compare_evaluations,
    describe,
    read_evaluation,
    sentence,
)
from rlprior.statistics.estimators import pass_at_k
from rlprior.statistics.intervals import difference_interval, holm

DECODING = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 64}


def benchmark(correct: Any, m: int = 8, **changes: Any) -> dict[str, Any]:
    """A suite's entry for one benchmark, its questions named q0, q1, ..."""
    correct = [int(one) for one in correct]
    n = len(correct)
    return {
        "title": "Made up",
        "category": "none",
        "metric": "sampled",
        "num_shots": 0,
        "version": "1",
        "problem_ids": [f"q{number}" for number in range(n)],
        "groups": [""] * n,
        "num_samples": m,
        "num_correct": correct,
        "consensus": [float(2 * one > m) for one in correct],
        **{f"num_{what}": [0] * n for what in ("truncated", "unparsable", "disputed", "tokens")},
        **changes,
    }


def write_suite(folder: Path, **benchmarks: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    results = {"format": 1, "model": "m", "suite": "s", "decoding": DECODING, "benchmarks": benchmarks}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_records(folder: Path, **tasks: dict[str, Any]) -> Path:
    """What `rlprior evaluate --config` writes: a record for each checkpoint, of which the last counts."""
    folder.mkdir(parents=True)
    last = {name: {**DECODING, **task} for name, task in tasks.items()}
    shared = {"stage": "model", "tokens": 0, "likelihood": {}}
    records = [
        {**shared, "step": 0, "final": False, "tasks": {"old": benchmark([1], **DECODING)}},
        {**shared, "step": 8, "final": True, "tasks": last},
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def compare(first: Path, second: Path, metric: str = "avg") -> Comparison:
    return compare_evaluations(read_evaluation(first), read_evaluation(second), Metric.parse(metric))


def draws(seed: int, n: int = 200, m: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, m + 1, size=n)


# Pairing


@pytest.mark.parametrize("write", [write_suite, write_records])
def test_questions_are_paired_by_name_whatever_their_order(tmp_path: Path, write: Any) -> None:
    left, right = draws(0), draws(1)
    order = np.random.default_rng(2).permutation(200)
    shuffled = benchmark(right[order], problem_ids=[f"q{number}" for number in order])
    found = compare(
        write(tmp_path / "a", arithmetic=benchmark(left)), write(tmp_path / "b", arithmetic=shuffled)
    )
    (row,) = found.rows
    assert row.difference == difference_interval((right - left) / 8)
    assert row.scores == pytest.approx((left.mean() / 8, right.mean() / 8), rel=1e-12)
    assert found.notes == ()


def test_each_metric_pairs_its_own_values(tmp_path: Path) -> None:
    left, right = draws(0), draws(1)
    a, b = (write_suite(tmp_path / name, x=benchmark(one)) for name, one in (("a", left), ("b", right)))
    passed = compare(a, b, "pass@4").rows[0]
    assert passed.difference == difference_interval(pass_at_k(8, right, 4) - pass_at_k(8, left, 4))
    voted = compare(a, b, "cons").rows[0]
    assert voted.difference == difference_interval((2 * right > 8) * 1.0 - (2 * left > 8))
    # 8 samples tell the noise of Avg and of Pass@4, not of Pass@5, and a vote's never
    assert passed.same_questions is not None
    assert compare(a, b, "pass@5").rows[0].same_questions is None
    assert voted.same_questions is None


def test_other_samples_of_the_same_questions_are_less_uncertain_than_other_questions(tmp_path: Path) -> None:
    # half of the questions gain everything, half lose half: nothing but the choice of questions is uncertain
    a = write_suite(tmp_path / "a", x=benchmark([0, 64] * 50, m=64))
    b = write_suite(tmp_path / "b", x=benchmark([64, 32] * 50, m=64))
    (row,) = compare(a, b).rows
    assert row.same_questions is not None
    assert row.same_questions.low < 0.25 < row.same_questions.high
    narrow, wide = (one.high - one.low for one in (row.same_questions, row.difference))
    assert narrow < wide / 5


def test_what_one_lacks_is_left_out_and_said(tmp_path: Path) -> None:
    a = write_suite(tmp_path / "a", x=benchmark(draws(0)), mine=benchmark(draws(0)))
    b = write_suite(tmp_path / "b", x=benchmark(draws(1, n=150)), yours=benchmark(draws(1)))
    found = compare(a, b)
    (row,) = found.rows
    assert (row.difference.num_questions, row.num_left_out) == (150, (50, 0))
    assert "x: 50 of 200 questions of A left out, which the other lacks" in found.notes
    assert "mine: only in A" in found.notes
    assert "yours: only in B" in found.notes


def test_other_settings_are_a_note(tmp_path: Path) -> None:
    a = write_suite(tmp_path / "a", x=benchmark(draws(0)))
    b = write_suite(
        tmp_path / "b", x=benchmark(draws(1, m=16), m=16, num_shots=4, temperature=1.0, version="2")
    )
    found = compare(a, b)
    assert "x: 8 samples a question in A, 16 in B" in found.notes
    for name, mine, yours in (("num_shots", 0, 4), ("temperature", 0.7, 1.0), ("version", 1, 2)):
        assert any(note.startswith(f"x: {name} is {mine} in A and {yours} in B") for note in found.notes)
    with pytest.raises(UsageError, match="x: left out, votes among 8 and among 16 samples are no comparison"):
        compare(a, b, "cons")
    with pytest.raises(UsageError, match="x: left out, Pass@9 needs 9 samples of a question and there are 8"):
        compare(a, b, "pass@9")


def test_a_benchmark_that_cannot_be_compared_leaves_the_others(tmp_path: Path) -> None:
    choices = benchmark([0, 1] * 100, m=1, metric="likelihood")
    a = write_suite(tmp_path / "a", x=benchmark(draws(0)), choices=choices)
    b = write_suite(tmp_path / "b", x=benchmark(draws(1)), choices=choices)
    assert [row.benchmark for row in compare(a, b).rows] == ["x", "choices"]
    found = compare(a, b, "pass@2")
    assert [row.benchmark for row in found.rows] == ["x"]
    assert found.notes == ("choices: left out, Pass@2 needs 2 samples of a question and there are 1",)


def test_programs_are_compared_though_nothing_votes(tmp_path: Path) -> None:
    a = write_suite(tmp_path / "a", mbpp=benchmark([1, 2], consensus=[]), gsm8k=benchmark([1, 2]))
    assert [row.benchmark for row in compare(a, a).rows] == ["mbpp", "gsm8k"]
    votes = compare(a, a, "cons")
    assert [row.benchmark for row in votes.rows] == ["gsm8k"]
    assert "mbpp: left out, no votes were counted" in votes.notes


def test_what_holds_of_many_benchmarks_is_said_once(tmp_path: Path) -> None:
    names = ("x", "y", "z")
    a = write_suite(tmp_path / "a", **{name: benchmark(draws(0)) for name in names})
    b = write_suite(tmp_path / "b", **{name: benchmark(draws(1), top_p=1.0) for name in names})
    assert compare(a, b).notes == (
        "x, y, z: top_p is 0.95 in A and 1.0 in B: the difference is that of more than the models",
    )


def test_decoding_means_nothing_to_likelihoods(tmp_path: Path) -> None:
    entry = benchmark([0, 1] * 100, m=1, metric="likelihood")
    a, b = write_suite(tmp_path / "a", x=entry), write_records(tmp_path / "b", x={**entry, "version": "2"})
    assert compare(a, a).notes == ()
    notes = compare(a, b).notes
    assert any(note.startswith("x: temperature is not recorded in A and 0.7 in B") for note in notes)


# Verdicts and words


def shifted(points: float) -> tuple[np.ndarray, np.ndarray]:
    """500 questions of 100 samples; the second model's counts are so many points higher, plus or minus 20 by turns."""
    first = np.full(500, 50)
    return first, first + round(points) + 20 * np.resize([1, -1], 500)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (
            "avg",
            "B answers 4.0 points more of these questions than A (95% interval +2.2 to +5.7; 500 questions)",
        ),
        ("pass@1", "B answers in 1 try 4.0 points more"),
    ],
)
def test_a_clear_difference_is_said_with_its_direction(tmp_path: Path, metric: str, words: str) -> None:
    first, second = shifted(4)
    a, b = (
        write_suite(tmp_path / name, x=benchmark(one, m=100)) for name, one in (("a", first), ("b", second))
    )
    (row,) = compare(a, b, metric).rows
    assert f"x: {words}" in sentence(row, Metric.parse(metric), 1)
    assert sentence(row, Metric.parse(metric), 1).endswith(": more than chance explains.")
    (back,) = compare(b, a, metric).rows
    assert "4.0 points fewer of these questions than A (95% interval -5.7 to -2.2;" in sentence(
        back, Metric.parse(metric), 1
    )
    assert (row.verdict, back.verdict) == ("better", "worse")


def test_votes_are_said_to_be_votes(tmp_path: Path) -> None:
    a = write_suite(tmp_path / "a", x=benchmark([0] * 100))
    b = write_suite(tmp_path / "b", x=benchmark([8] * 40 + [0] * 60))
    text = describe(compare(a, b, "cons"))
    assert "x: B's majority vote answers 40.0 points more of these questions than A" in text


def test_equal_evaluations_are_not_told_apart(tmp_path: Path) -> None:
    a = write_suite(tmp_path / "a", x=benchmark(draws(0)))
    (row,) = compare(a, a).rows
    assert row.verdict == "undecided"
    assert sentence(row, Metric("avg"), 1) == (
        "x: no difference larger than chance could make (B - A 0.0 points, 95% interval -1.4 to +1.4; 200 questions)."
    )


def test_many_benchmarks_are_corrected_together(tmp_path: Path) -> None:
    """One benchmark with a p-value near 0.03 stands alone, and not among five."""
    first, second = shifted(2)
    names = [f"same{number}" for number in range(4)]
    same = {name: benchmark(draws(0)) for name in names}
    a = write_suite(tmp_path / "a", x=benchmark(first, m=100), **same)
    b = write_suite(tmp_path / "b", x=benchmark(second, m=100), **same)
    alone = compare_evaluations({"x": read_evaluation(a)["x"]}, {"x": read_evaluation(b)["x"]}, Metric("avg"))
    assert alone.rows[0].verdict == "better"
    found = compare(a, b)
    assert [row.corrected_p for row in found.rows] == holm([row.difference.p_value for row in found.rows])
    row = found.rows[0]
    assert row.difference == alone.rows[0].difference
    assert row.verdict == "alone"
    text = describe(found)
    assert "more than chance explains for this benchmark alone, but not for one picked among 5." in text
    assert (
        "Of 5 benchmarks, after Holm's correction, B is better than A on 0 and worse on 0; on 5 chance"
        in text
    )
    assert "corrected for 5 benchmarks by Holm's method" in text


def test_few_questions_are_a_note(tmp_path: Path) -> None:
    a = write_suite(tmp_path / "a", x=benchmark(draws(0, n=30)))
    b = write_suite(tmp_path / "b", x=benchmark(draws(1, n=30)))
    assert "note: x: 30 questions are few: the interval may be too narrow" in describe(compare(a, b))


def test_the_table_lines_up(tmp_path: Path) -> None:
    a = write_suite(tmp_path / "a", x=benchmark(draws(0)), much_longer_name=benchmark(draws(1, n=60)))
    b = write_suite(tmp_path / "b", x=benchmark(draws(2)), much_longer_name=benchmark(draws(3, n=60)))
    lines = describe(compare(a, b)).splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("benchmark "))
    assert len({len(line) for line in lines[header : header + 3]}) == 1


# The command


def test_the_command_prints_and_writes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_suite(tmp_path / "a", x=benchmark(draws(0)))
    b = write_records(tmp_path / "b", x=benchmark(draws(1)))
    out = tmp_path / "new" / "found.json"
    assert main(["compare", str(a), str(b), "--metric", "pass@4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    found = compare(a, b, "pass@4")
    assert printed == f"A: {a}\nB: {b}\n\n{describe(found)}\n\nwritten: {out}\n"
    written = json.loads(out.read_text())
    assert written == {"a": str(a), "b": str(b), **json.loads(json.dumps(as_data(found)))}
    one = written["benchmarks"]["x"]
    assert one["difference"] == pytest.approx(one["scores"][1] - one["scores"][0], abs=1e-15)
    assert one["sentence"] in printed
    assert written["correction"] == "none, one benchmark"


def test_a_real_evaluation_can_be_compared(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tables = study_tables()
    config = {"data": tables["data"], "evaluation": tables["evaluation"], "window_tokens": 128}
    path = write_toml(tmp_path / "evaluate.toml", config)
    assert main(["evaluate", str(last_checkpoint(trained)), "--config", str(path), "--out", "scores"]) == 0
    capsys.readouterr()
    for metric in ("avg", "cons", "pass@4"):
        assert main(["compare", "scores", "scores", "--metric", metric]) == 0
        assert "sums: no difference larger than chance could make" in capsys.readouterr().out


def spoilt(**changes: Any) -> str:
    return json.dumps({"decoding": DECODING, "benchmarks": {"x": benchmark([1, 2], **changes)}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", "", "no evaluation of benchmarks there; give a folder that `rlprior evaluate` wrote"),
        ("results.json", "{", "results.json: not what `rlprior evaluate` writes ("),
        ("results.json", "[]", "results.json: not what"),
        ("results.json", '{"decoding": {}, "benchmarks": {}}', "no evaluation of benchmarks there"),
        ("results.json", '{"decoding": {}, "benchmarks": {"x": {}}}', "the field 'problem_ids' is missing"),
        ("results.json", spoilt(num_correct=[1]), "task.num_correct must be 2 finite numbers"),
        ("results.json", spoilt(num_correct=[1, 9]), "num_correct must lie between 0 and num_samples = 8"),
        ("results.json", spoilt(num_correct=[1, 0.5]), "whole numbers"),
        ("results.json", spoilt(consensus=[0, 2]), "consensus must lie between 0 and 1"),
        ("results.json", spoilt(problem_ids=["q", "q"]), "ids must be there, and each once"),
        (
            "results.jsonl",
            '{"stage": "model", "step": 8, "tokens": 0, "final": true, "tasks": {}}\n',
            "no evaluation of benchmarks there",
        ),
        ("results.jsonl", '{"step": 8}\n', "results.jsonl:1: the field 'stage' is missing"),
    ],
)
def test_a_folder_that_is_no_evaluation_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, message: str
) -> None:
    good = write_suite(tmp_path / "good", x=benchmark(draws(0)))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / name).write_text(content)
    out = tmp_path / "out.json"
    assert main(["compare", str(good), str(tmp_path / "bad"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rlprior: {tmp_path / 'bad'}")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("metric", ["pass", "pass@0", "pass@x", "median"])
def test_an_unknown_metric_is_told(metric: str) -> None:
    with pytest.raises(UsageError, match="write avg, cons or pass@K, as in pass@8"):
        Metric.parse(metric)


def test_nothing_in_common_is_told(tmp_path: Path) -> None:
    a = write_suite(tmp_path / "a", x=benchmark(draws(0)))
    other = benchmark(draws(0), problem_ids=[f"z{number}" for number in range(200)])
    with pytest.raises(UsageError, match="nothing to compare: x: left out, no question in common"):
        compare(a, write_suite(tmp_path / "b", x=other))
