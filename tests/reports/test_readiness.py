"""Verdicts in words from planted pools, and the page that compares models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.study.fake_study import SMALL, make_fake_study

from rlprior.cli import main
from rlprior.config import UsageError
from rlprior.evaluation.judgement import (
    MIN_SIGNAL,
    ModelReadiness,
    compare_models,
    forking_shares,
    judge_model,
    judge_task,
    percent,
    text_rows,
    verdict_sentence,
)
from rlprior.evaluation.token_statistics import summarise_tokens
from rlprior.models.likelihood import TokenMeasurements
from rlprior.reports.readiness import check_on_study, describe_readiness, write_page
from rlprior.statistics.estimators import pass_at_k, signal_at_g
from rlprior.study.readiness_plan import name_models

M = 128


def task(correct: Any, *, unparsable: int = 0, truncated: int = 0, m: int = M) -> dict[str, Any]:
    """Columns of a task; of the responses that are not right, the first are unparsable, the next cut, the others wrong."""
    correct = np.asarray(correct)
    wrong = m * len(correct) - int(correct.sum()) - unparsable - truncated
    assert wrong >= 0
    return {
        "num_samples": m,
        "problem_ids": [f"q{number}" for number in range(len(correct))],
        "num_correct": correct.tolist(),
        "num_truncated": [truncated, *[0] * (len(correct) - 1)],
        "statuses": {
            "correct": int(correct.sum()),
            "wrong": wrong,
            "unparsable": unparsable,
            "truncated": truncated,
            "timed_out": 0,
            "failed": 0,
        },
        "responses": summary(),
        "solutions": {"num_tokens": 10, "num_documents": 2, "cross_entropy_nats": 0.5, "end_prob": 0.9},
    }


def summary(scale: float = 1.0) -> dict[str, Any]:
    entropy = np.linspace(0, 4 * scale, 1001).astype(np.float32)
    ones = np.ones(1001, dtype=np.float32)
    tokens = TokenMeasurements(
        document_ids=("d",),
        num_tokens=np.array([1001]),
        num_bytes=np.array([3000]),
        top_k=100,
        cross_entropy_nats=2 * ones,
        entropy_nats=entropy,
        head_mass=0.9 * ones,
        target_rank=ones,
        top_prob=0.5 * ones,
    )
    return summarise_tokens(tokens)


def model(label: str, *, scale: float = 1.0, tokenizer: str = "t", **tasks: Any) -> ModelReadiness:
    result = {
        "format": 1,
        "num_parameters": 1000,
        "tokenizer": tokenizer,
        "decoding": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64},
        "text": summary(scale),
        "tasks": tasks,
    }
    return judge_model(label, result, group_size=16)


HALF = np.tile([0, 10, 64, 100, 128], 20)
HARD = np.array([0] * 99 + [1])
EASY = np.array([128] * 99 + [127])


def test_a_model_with_signal_would_learn_and_has_room() -> None:
    one = judge_task("sums", task(HALF), group_size=16)
    assert one.judgement == "would learn"
    signal = float(np.mean(signal_at_g(M, HALF, 16)))
    assert one.signal_at_group_size.value == pytest.approx(signal)
    assert list(one.signal) == [4, 8, 16, 32, 64]
    assert list(one.passed) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert [round(one.passed[k].value, 12) for k in (1, 8)] == [
        round(float(np.mean(pass_at_k(M, HALF, k))), 12) for k in (1, 8)
    ]
    assert (one.never.value, one.sometimes.value, one.always.value) == (0.2, 0.6, 0.2)
    assert one.reasons[1] == (
        "of 100 questions 20.0% are never right in 128 samples, 60.0% sometimes, 20.0% always"
    )
    # Pass@128 = 0.8, Avg@128 = (10 + 64 + 100 + 128) / 5 / 128 = 0.472
    assert one.advice == (
        "room: answers that it already finds, made more probable, would raise Avg@128 by up to 33 points to Pass@128 = 80.0%",
    )


@pytest.mark.parametrize(
    ("columns", "cause", "advice"),
    [
        (
            task(HARD),
            "too hard: <0.1% of its responses are right, >99.9% state a wrong answer",
            "pose easier problems",
        ),
        (
            task(HARD, unparsable=9000),
            "unreadable: <0.1% of its responses are right, 70.3% end without an answer that can be read",
            "show it how an answer is stated",
        ),
        (
            task(HARD, unparsable=4000, truncated=6000),
            "does not end: <0.1% of its responses are right, 46.9% are cut by the length limit before they state one",
            "train on whole documents",
        ),
        (task(EASY), "too easy: >99.9% of its responses are right already", "pose harder problems"),
    ],
)
def test_a_model_without_signal_would_hardly_learn_and_the_largest_fault_says_why(
    columns: dict[str, Any], cause: str, advice: str
) -> None:
    one = judge_task("sums", columns, group_size=16)
    assert one.judgement == "would hardly learn"
    assert one.reasons[2].startswith(cause)
    assert one.advice[0].startswith(advice)


def test_form_is_named_where_it_fails_even_with_signal() -> None:
    one = judge_task("sums", task(HALF, unparsable=1000, truncated=2000), group_size=16)
    assert one.judgement == "would learn"
    assert one.ended == pytest.approx(1 - 2000 / 12800)
    assert one.readable == pytest.approx(1 - 3000 / 12800)
    assert one.reasons[2:] == (
        "only 84.4% of its responses end by themselves",
        "only 76.6% state an answer that can be read: the form is the first thing RL would teach",
    )


def test_borderline_is_where_the_interval_holds_the_threshold() -> None:
    """20 of 100 questions teach: the signal is the threshold itself."""
    correct = np.array([64] * 20 + [0] * 80)
    one = judge_task("sums", task(correct), group_size=16)
    signal = one.signal_at_group_size
    assert signal.low < MIN_SIGNAL < signal.high
    assert one.judgement == "borderline"


def test_larger_groups_are_advised_where_they_would_do() -> None:
    """One right answer in 128: a group of G holds it with chance G / 128."""
    one = judge_task("sums", task(np.ones(400, dtype=int)), group_size=4)
    assert one.judgement == "would hardly learn"
    assert one.advice[1] == (
        "groups of 32 would reach 20%: with a gradient are 3.1% at 4, 6.2% at 8, 12.5% at 16, 25.0% at 32, 50.0% at 64"
    )
    none = judge_task("sums", task(HARD), group_size=16)
    assert none.advice[1].startswith("no group size that")


@pytest.mark.parametrize("size", [1, 129])
def test_a_group_needs_as_many_samples(size: int) -> None:
    with pytest.raises(UsageError, match=f"--group-size {size} must be between 2 and the 128 samples"):
        judge_task("sums", task(HALF), group_size=size)


def test_another_task_is_pointed_to() -> None:
    one = model("A", easy=task(HALF), hard=task(HARD))
    assert one.tasks["hard"].advice[0] == "it would learn on easy"
    assert len(one.tasks["easy"].advice) == 1


def test_models_are_compared_question_by_question() -> None:
    """B is A with less signal on every question that has any; C is A again."""
    models = [
        model("A", sums=task(HALF)),
        model("B", sums=task(np.where(HALF % 128, 1, HALF))),
        model("C", sums=task(HALF)),
    ]
    lines = compare_models(models, "sums")
    assert lines[0] == "sums: would learn: A, C; would hardly learn: B."
    assert lines[1].startswith("A has the largest signal@16, ")
    assert lines[1].endswith("above B; not told apart from C.")
    assert compare_models(models[::2], "sums")[0].endswith("would learn: all 2 models.")
    assert compare_models([model(name, sums=task([0] * 9)) for name in "AB"], "sums")[1] == (
        "signal@16 is 0 for all of them."
    )


def test_forking_tokens_are_counted_by_the_first_models_threshold() -> None:
    models = [model("A", sums=task(HALF)), model("B", scale=2.0, sums=task(HALF))]
    threshold, shares = forking_shares(models)
    assert threshold == pytest.approx(3.2)  # entropies are even between 0 and 4
    assert shares == pytest.approx([0.2, 0.6], abs=1e-6)
    assert [row["fork_share"] for row in text_rows(models)] == shares
    assert text_rows(models)[0]["solution_nats"] == 0.5


def test_labels() -> None:
    assert percent(0.5) == "50.0%"
    with pytest.raises(UsageError, match="two models are called 'm'"):
        name_models(["a/m", "b/m"])
    sentence = verdict_sentence("A", judge_task("sums", task(HARD), group_size=16))
    assert sentence.startswith("A would hardly learn on sums: ")


def test_the_page_needs_nothing_else_and_escapes_labels(tmp_path: Path) -> None:
    models = [
        model("<b>A</b>", easy=task(HALF), hard=task(HARD)),
        model("B", tokenizer="other", easy=task(EASY), hard=task(HARD, truncated=9000)),
    ]
    study = make_fake_study(tmp_path / "study", seeds=(0, 1), size=SMALL)
    section = check_on_study(study, group_size=16)
    page = write_page(tmp_path, models, section, command="rlprior readiness A B").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|figures/|readiness\.json|#)', page)
    assert "<b>A</b>" not in page
    assert "different tokenizers" in page
    for name in ("signal", "pass", "splits", "prediction"):
        assert (tmp_path / "figures" / f"readiness-{name}.png").stat().st_size > 5000
    for one in models:
        for name in ("easy", "hard"):
            assert one.tasks[name].reasons[1] in page
    numbers = json.loads((tmp_path / "readiness.json").read_text(), parse_constant=pytest.fail)
    assert numbers["models"][0]["tasks"]["easy"]["judgement"] == "would learn"
    assert numbers["prediction"]["sentences"] == section.sentences
    text = describe_readiness(models, section)
    assert "<b>A</b> would learn on easy" in text
    assert section.sentences[0] in text


def test_one_model_without_a_study_says_that_nothing_was_tested(tmp_path: Path) -> None:
    page = write_page(tmp_path, [model("A", sums=task(HALF))], None, command="c").read_text()
    assert "Not tested here" in page
    assert "different tokenizers" not in page


def test_the_command_measures_judges_and_resumes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.toml"
    config.write_text(
        '[data]\nheld_out_fraction = 0.2\n[[data.sources]]\nname = "sums"\nkind = "problems"\nnum_problems = 50\n'
        'problems = { families = ["addition"], difficulties = [1] }\n'
        '[evaluation]\nheld_out_sources = ["sums"]\ndecoding = { temperature = 1.0, max_new_tokens = 4 }\n'
        "final = { held_out_tokens = 200, num_problems = 3, samples_per_problem = 4 }\n"
        '[evaluation.tasks.sums]\nfamilies = ["addition"]\ndifficulties = [1]\n'
    )
    folder = sorted((trained / "checkpoints").glob("step-*"))[-1]
    arguments = ["readiness", f"A={folder}", "--config", str(config), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--group-size", "4"]) == 0
    first = capsys.readouterr().out
    assert (
        "A is borderline on sums: 0% (0 to " in first
    )  # three questions that no sample answers decide nothing
    assert main([*arguments, "--group-size", "2"]) == 0  # another question of the same pool
    second = capsys.readouterr().out
    assert "readiness A: done already" in second
    assert "groups of 2" in second
    assert main([*arguments, "--group-size", "8"]) == 2
    assert "draw more with --samples" in capsys.readouterr().err
    assert main([*arguments, "--group-size", "8", "--samples", "8", "--dry-run"]) == 0
    assert "0 done already" in capsys.readouterr().out


def test_nothing_to_measure_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["readiness"]) == 2
    line = capsys.readouterr().err.strip()
    assert line == "rlprior: rlprior readiness: name a model's folder, or a study with --study"
