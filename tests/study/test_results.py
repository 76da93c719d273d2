"""Reading a study: what is damaged is named, what is not there yet is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.study.fake_study import SAME_ARMS, Size, make_fake_study

from rlprior.config import RunError, UsageError
from rlprior.study.results import load_study

SMALL = Size(
    documents=8,
    questions=6,
    samples=4,
    intermediate_documents=4,
    intermediate_questions=3,
    intermediate_samples=2,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_fake_study(tmp_path / "study", SAME_ARMS, size=SMALL)


def edit_study(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "study.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_record(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "runs/midtrain-same-s0/eval/results.jsonl"
    first, *rest = path.read_text().splitlines()
    record = json.loads(first)
    change(record)
    path.write_text("\n".join([json.dumps(record), *rest]) + "\n")


def test_everything_is_read(directory: Path) -> None:
    study = load_study(directory)
    assert [arm.name for arm in study.arms] == ["ce", "same"]
    assert study.stages == ("pretrain", "midtrain", "rl")
    assert study.missing == ()
    final = study.final("same", 0, "midtrain")
    raw = json.loads((directory / "runs/midtrain-same-s0/eval/results.jsonl").read_text().splitlines()[-1])
    assert final is not None
    assert final.likelihood is not None
    np.testing.assert_array_equal(final.likelihood.entropy_nats, raw["likelihood"]["entropy_nats"])
    np.testing.assert_array_equal(
        final.tasks["arithmetic"].num_correct, raw["tasks"]["arithmetic"]["num_correct"]
    )
    assert final.tasks["arithmetic"].num_samples == 4
    assert len(study.runs["same", 0, "rl"].metrics) == 80


def test_unfinished_runs_are_missing(tmp_path: Path) -> None:
    left = [("same", 1, "pretrain"), ("same", 1, "rl")]
    study = load_study(make_fake_study(tmp_path, SAME_ARMS, (0, 1), size=SMALL, unfinished=left))
    assert study.missing == tuple(left)
    assert study.runs["same", 1, "pretrain"].checkpoints == ()
    assert len(study.runs["same", 1, "rl"].checkpoints) == 2


def test_a_line_torn_by_a_kill_is_dropped(directory: Path) -> None:
    path = directory / "runs/rl-ce-s0/eval/results.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    study = load_study(directory)
    assert study.missing == (("ce", 0, "rl"),)


def test_no_study_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no study\.json"):
        load_study(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("seeds"), "field 'seeds' is missing"),
        (lambda data: data["arms"][0].pop("label"), "field 'label' is missing"),
        (lambda data: data.update(baseline="nobody"), "baseline 'nobody' is not one of the arms ce, same"),
        (lambda data: data["arms"].append(data["arms"][0]), "arms need different names"),
        (lambda data: data.update(arms=[]), "at least"),
        (lambda data: data["runs"][0].update(arm="other"), "arm 'other'"),
        (lambda data: data["runs"][0].update(seed=9), "seed 9"),
        (lambda data: data["runs"][0].update(stage="sft"), "stage 'sft'"),
    ],
)
def test_a_senseless_study_is_named(
    directory: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_study(directory, change)
    with pytest.raises(RunError, match=rf"study\.json: .*{re.escape(message)}"):
        load_study(directory)


def test_broken_json_is_named(directory: Path) -> None:
    (directory / "study.json").write_text("{")
    with pytest.raises(RunError, match=r"study\.json: not valid JSON"):
        load_study(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("tokens"), "field 'tokens' is missing"),
        (lambda record: record["likelihood"].pop("entropy_nats"), "field 'entropy_nats' is missing"),
        (
            lambda record: record["likelihood"]["entropy_nats"].pop(),
            "likelihood.entropy_nats must be 4 finite numbers",
        ),
        (
            lambda record: record["likelihood"]["entropy_nats"].__setitem__(0, float("nan")),
            "must be 4 finite numbers",
        ),
        (lambda record: record["likelihood"].update(document_ids=["a"] * 4), "each once"),
        (
            lambda record: record["tasks"]["arithmetic"]["num_correct"].__setitem__(0, 3),
            "between 0 and num_samples = 2",
        ),
        (lambda record: record["tasks"]["arithmetic"].update(problem_ids=[]), "ids must be there"),
    ],
)
def test_a_damaged_record_is_named(
    directory: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_record(directory, change)
    with pytest.raises(RunError, match=rf"results\.jsonl:1: .*{re.escape(message)}"):
        load_study(directory)


def test_a_line_that_is_not_json_is_named(directory: Path) -> None:
    path = directory / "runs/rl-ce-s0/metrics.jsonl"
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(RunError, match=r"metrics\.jsonl: not JSON lines"):
        load_study(directory)
