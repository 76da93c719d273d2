"""Records of every format that evaluations were ever written in, as small fixtures, and what is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlprior.config import RunError
from rlprior.evaluation.record import read_records

COUNTS: dict[str, Any] = {
    "problem_ids": ["a", "b"],
    "num_correct": [3, 0],
    "consensus": [1.0, 0.0],
    "num_truncated": [0, 1],
    "num_unparsable": [0, 2],
    "num_tokens": [12, 16],
}
LIKELIHOOD: dict[str, Any] = {
    "document_ids": ["d"],
    "num_tokens": [5],
    "num_bytes": [20],
    "cross_entropy_nats": [10.0],
    "entropy_nats": [9.0],
    "head_mass": [4.0],
}
DECODING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 64}


def test_a_record_of_a_study_made_before(tmp_path: Path) -> None:
    shared = {"stage": "rl", "tokens": 512, "tasks": {"sums": {**COUNTS, **DECODING, "num_samples": 4}}}
    likelihood = {**LIKELIHOOD, "unigram_cross_entropy_nats": [15.0]}
    records = [
        {**shared, "step": step, "final": step == 8, "likelihood": likelihood, "text": {"perplexity": 7.4}}
        for step in (4, 8)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    first, last = read_records(tmp_path)
    assert (first.step, first.final, last.step, last.final) == (4, False, 8, True)
    assert (last.stage, last.tokens, last.text) == ("rl", 512, {"perplexity": 7.4})
    assert last.likelihood is not None
    assert last.likelihood.unigram_cross_entropy_nats.tolist() == [15.0]
    assert last.likelihood.reference_kl_nats.tolist() == []
    scores = last.tasks["sums"]
    assert (scores.temperature, scores.top_p, scores.max_new_tokens) == (0.7, 0.95, 64)
    assert scores.num_unparsable.tolist() == [0, 2]


def test_the_results_of_a_suite_made_before(tmp_path: Path) -> None:
    """The limit of a benchmark wins over the one that was asked, None here; choices by likelihood were not sampled."""
    sampled = {**COUNTS, "num_samples": 4, "metric": "sampled", "max_new_tokens": 4096, "num_shots": 4}
    programs = {**sampled, "consensus": []}
    choices = {"metric": "likelihood", "num_samples": 1, "problem_ids": ["x"], "num_correct": [1]}
    data = {
        "format": 1,
        "model": "m",
        "suite": "paper-base",
        "decoding": {**DECODING, "max_new_tokens": None, "precision": "float32"},
        "missing": {"mmlu": "no such file"},
        "benchmarks": {"gsm8k": sampled, "humanevalplus": programs, "piqa": choices},
    }
    (tmp_path / "results.json").write_text(json.dumps(data))
    (record,) = read_records(tmp_path)
    assert (record.stage, record.step, record.final, record.likelihood) == ("model", 0, True, None)
    assert record.settings["suites"] == ["paper-base"]
    assert record.settings["missing"] == {"mmlu": "no such file"}
    assert record.tasks["gsm8k"].settings == {
        "temperature": 0.7,
        "top_p": 0.95,
        "max_new_tokens": 4096,
        "precision": "float32",
        "metric": "sampled",
        "num_shots": 4,
    }
    assert record.tasks["humanevalplus"].consensus.tolist() == []
    assert record.tasks["piqa"].settings == {"metric": "likelihood"}
    assert record.tasks["piqa"].num_tokens.tolist() == [0]


def test_a_readiness_made_before(tmp_path: Path) -> None:
    task = {**COUNTS, "num_samples": 4, "statuses": {"correct": 3}, "responses": {}, "solutions": None}
    data = {
        "format": 1,
        "num_parameters": 1000,
        "tokenizer": "abc",
        "decoding": {**DECODING, "stop": []},
        "text": {"perplexity": 7.4},
        "likelihood": LIKELIHOOD,
        "tasks": {"sums": task},
    }
    (tmp_path / "readiness.json").write_text(json.dumps(data))
    (record,) = read_records(tmp_path)
    assert record.settings["num_parameters"] == 1000
    assert record.settings["tokenizer"] == "abc"
    assert record.tasks["sums"].entry["statuses"] == {"correct": 3}
    assert record.tasks["sums"].temperature == 0.7
    assert record.likelihood is not None
    assert np.isnan(record.likelihood.unigram_cross_entropy_nats).tolist() == [True]


def test_nothing_finished_is_no_record(tmp_path: Path) -> None:
    assert read_records(tmp_path) == ()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.jsonl", '{"format": 3}\n', "results.jsonl:1: format 3 is of a later version"),
        ("results.jsonl", "[]\n", "results.jsonl:1: "),
        ("results.jsonl", "x\n{}\n", "results.jsonl: not JSON lines"),
        ("results.json", "{", "results.json: not what"),
        ("readiness.json", '{"decoding": {}}', "readiness.json: the field"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RunError) as caught:
        read_records(tmp_path)
    assert message in str(caught.value)
