"""The evaluation stage: one record a checkpoint, in the format that the report reads, the same bytes after a kill."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.small_study import Killed, crash_on_call, find_run, make_run, study_config

from rlprior.data.packing import Corpus
from rlprior.evaluation import stage
from rlprior.evaluation.stage import describe_results
from rlprior.models.causal_lm import load_model
from rlprior.models.likelihood import held_out_documents, measure_tokens, unigram_cross_entropy
from rlprior.runs.files import read_jsonl
from rlprior.sampling import answers as answers_module
from rlprior.study.plan import PlannedRun, plan_study
from rlprior.study.results import load_study
from rlprior.study.runner import execute, write_study_file
from rlprior.training.checkpoint import checkpoint_directory

CONFIG = study_config("arms={ce={label='ce', objective={name='cross_entropy'}}}")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PlannedRun]]:
    """A corpus and one pre-training run with checkpoints at steps 3 and 6, evaluated."""
    directory = tmp_path_factory.mktemp("study")
    plan = plan_study(CONFIG, directory)
    for planned in plan[:3]:
        execute(planned)
    return directory, plan


@pytest.fixture
def records(study: tuple[Path, list[PlannedRun]]) -> list[dict[str, Any]]:
    return read_jsonl(find_run(study[1], "evaluate pretrain ce s0").directory / "results.jsonl")


def test_one_record_a_checkpoint(records: list[dict[str, Any]]) -> None:
    found = [(record["stage"], record["step"], record["tokens"], record["final"]) for record in records]
    assert found == [("pretrain", 3, 3 * 256, False), ("pretrain", 6, 6 * 256, True)]


def test_an_intermediate_budget_is_a_prefix_of_the_final_one(records: list[dict[str, Any]]) -> None:
    intermediate, final = records
    for path in (("likelihood", "document_ids"), ("tasks", "sums", "problem_ids")):
        few, many = intermediate, final
        for key in path:
            few, many = few[key], many[key]
        assert many[: len(few)] == few
        assert 0 < len(few) < len(many)
    budgets = CONFIG.evaluation.intermediate, CONFIG.evaluation.final
    for record, budget in zip(records, budgets, strict=True):
        counts = record["likelihood"]["num_tokens"]
        assert sum(counts) >= budget.held_out_tokens > sum(counts[:-1])
        assert len(record["tasks"]["sums"]["problem_ids"]) == budget.num_problems
        assert record["tasks"]["sums"]["num_samples"] == budget.samples_per_problem
        assert len(record["tasks"]["sums"]["baseline_pass_at_k"]) == budget.samples_per_problem


def test_a_record_is_of_its_own_checkpoint(
    study: tuple[Path, list[PlannedRun]], records: list[dict[str, Any]]
) -> None:
    run = find_run(study[1], "pretrain ce s0")
    corpus = Corpus.open(find_run(study[1], "data").directory)
    documents = held_out_documents(corpus, ["sums", "stories"], 600)
    for record in records:
        model = load_model(checkpoint_directory(run.directory, record["step"]))
        few = documents[: len(record["likelihood"]["document_ids"])]
        expected = measure_tokens(model, few, window_tokens=128, top_k=100).by_document()
        expected["unigram_cross_entropy_nats"] = unigram_cross_entropy(corpus, ["sums", "stories"], few)
        assert record["likelihood"] == expected
    assert (
        records[1]["likelihood"]["cross_entropy_nats"][0] < records[0]["likelihood"]["cross_entropy_nats"][0]
    )


def test_the_report_reads_what_the_stage_writes(
    study: tuple[Path, list[PlannedRun]], records: list[dict[str, Any]]
) -> None:
    directory, plan = study
    write_study_file(CONFIG, directory, plan, command="rlprior study small.toml")
    loaded = load_study(directory)
    assert loaded.missing == (("ce", 0, "midtrain"), ("ce", 0, "rl"))
    run = loaded.runs["ce", 0, "pretrain"]
    assert [checkpoint.step for checkpoint in run.checkpoints] == [3, 6]
    assert len(run.metrics) == 6
    final = loaded.final("ce", 0, "pretrain")
    assert final is not None
    assert final.likelihood is not None
    likelihood, scores = records[1]["likelihood"], records[1]["tasks"]["sums"]
    for name in ("num_tokens", "num_bytes", "cross_entropy_nats", "entropy_nats", "head_mass"):
        assert getattr(final.likelihood, name).tolist() == likelihood[name], name
    task = final.tasks["sums"]
    for name in ("num_correct", "consensus", "num_truncated", "num_unparsable", "num_tokens"):
        assert getattr(task, name).tolist() == scores[name], name
    decoding = CONFIG.evaluation.decoding
    assert (task.temperature, task.top_p, task.max_new_tokens) == (
        decoding.temperature,
        decoding.top_p,
        decoding.max_new_tokens,
    )


CRASHES = {
    "between checkpoints": (stage, "_measure", 1, True),
    "in the final pool": (answers_module, "sample", 3, False),
    "after the pool, before its grades": (answers_module, "write_grades", 2, False),
    "before the records": (stage, "write_atomically", 2, False),
}


@pytest.mark.parametrize("where", CRASHES)
def test_a_crash_changes_no_byte(
    study: tuple[Path, list[PlannedRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(
        answers_module, "MAX_ROWS", 16
    )  # four problems of four samples, two batches at the end
    planned = find_run(study[1], "evaluate pretrain ce s0")
    whole, crashed = (
        dataclasses.replace(planned, directory=tmp_path / name) for name in ("whole", "crashed")
    )
    execute(whole)
    module, name, number, after = CRASHES[where]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, crash_on_call(number, after, getattr(module, name)))
        with pytest.raises(Killed):
            execute(crashed)
    assert not crashed.is_done
    execute(crashed)
    names = [
        "results.jsonl",
        "result.json",
        *(f"samples/sums-0000000{n}{s}.jsonl" for n in (3, 6) for s in ("", ".grades")),
    ]
    for name in names:
        assert (crashed.directory / name).read_bytes() == (whole.directory / name).read_bytes(), name


def test_arms_meet_the_same_questions_and_random_numbers(
    study: tuple[Path, list[PlannedRun]], tmp_path: Path
) -> None:
    """Two runs with equal weights give equal answers, whatever their names and training seeds."""
    planned = find_run(study[1], "evaluate pretrain ce s0")
    copy = tmp_path / "other"
    shutil.copytree(planned.config.target, copy)
    config = dataclasses.replace(planned.config, target=str(copy))
    other = make_run("evaluate", config, tmp_path / "evaluation")
    one, two = (read_jsonl(run.directory / "results.jsonl") for run in (planned, other))
    assert one == two


def test_a_hugging_face_folder_is_measured_too(
    study: tuple[Path, list[PlannedRun]], tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    planned = find_run(study[1], "evaluate pretrain ce s0")
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_directory(Path(planned.config.target), 6), folder)
    for name in ("checkpoint.json", "optimizer.safetensors"):
        (folder / name).unlink()
    config = dataclasses.replace(planned.config, target=str(folder), steps=(), stage="model")
    run = make_run("evaluate", config, tmp_path / "evaluation")
    (record,) = read_jsonl(run.directory / "results.jsonl")
    assert (record["stage"], record["step"], record["tokens"], record["final"]) == ("model", 0, 0, True)
    assert record["likelihood"] == records[1]["likelihood"]
    assert record["tasks"] == records[1]["tasks"]


def test_description_of_the_last_record(tmp_path: Path) -> None:
    """By hand: 10 tokens at 2 nats, entropy 1.5; 3 of 8 right, one of two problems solved by the majority."""
    record: dict[str, Any] = {
        "likelihood": {
            "document_ids": ["a", "b"],
            "num_tokens": [4, 6],
            "cross_entropy_nats": [8.0, 12.0],
            "entropy_nats": [7.0, 8.0],
            "unigram_cross_entropy_nats": [10.0, 20.0],
        },
        "text": {
            "bits_per_byte": 1.25,
            "top_k": 100,
            "head_mass": 0.8,
            "top_k_share": 0.75,
            "top1_share": 0.3,
            "calibration_error": 0.0456,
        },
        "tasks": {
            "sums": {
                "num_samples": 4,
                "num_correct": [3, 0],
                "consensus": [1.0, 0.0],
                "num_truncated": [1, 1],
                "num_unparsable": [0, 4],
                "num_timed_out": [0, 0],
                "num_failed": [0, 0],
                "baseline_accuracy": 0.5,
            }
        },
    }
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    first, text, second = describe_results(tmp_path).splitlines()
    assert first == "held-out text (10 tokens): perplexity 7.39 (unigram 20.1), entropy 1.500 nats"
    assert text == (
        "  1.250 bits per byte, mass of the 100 most probable tokens 0.800, target among them 75.0%, first 30.0%, "
        "calibration error 0.046"
    )
    assert second == (
        "sums (2 problems): Avg@4 0.375, Cons@4 0.500, Pass@4 0.500; cut 25.0%, unparsable 50.0%; best constant answer 0.500"
    )


def test_a_study_without_tasks_measures_text_alone(
    study: tuple[Path, list[PlannedRun]], tmp_path: Path
) -> None:
    planned = find_run(study[1], "evaluate pretrain ce s0")
    evaluation = dataclasses.replace(planned.config.evaluation, tasks={})
    run = make_run("evaluate", dataclasses.replace(planned.config, evaluation=evaluation), tmp_path / "run")
    assert [record["tasks"] for record in read_jsonl(run.directory / "results.jsonl")] == [{}, {}]
