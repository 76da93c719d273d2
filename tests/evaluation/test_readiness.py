"""The readiness stage on a tiny model: what it writes, against dense passes, and the same bytes after a kill."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_study import Killed, crash_on_call, find_run, study_config

from rlprior.data.tokenizer import encode_prompt
from rlprior.evaluation.readiness import (
    RESPONSES_READ,
    ReadinessRunConfig,
    response_documents,
)
from rlprior.models.causal_lm import load_model, load_tokenizer
from rlprior.runs.files import read_jsonl
from rlprior.sampling import answers as answers_module
from rlprior.sampling.store import read_samples
from rlprior.study.plan import PlannedRun, plan_run, plan_study
from rlprior.study.runner import execute
from rlprior.tasks.config import load_task
from rlprior.tasks.problem import Problem
from rlprior.training.checkpoint import checkpoint_directory

CONFIG = study_config("arms={ce={label='ce', objective={name='cross_entropy'}}}")
M, N = 8, 6


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> PlannedRun:
    """The readiness of a model after six steps of training, not made yet."""
    directory = tmp_path_factory.mktemp("study")
    plan = plan_study(CONFIG, directory)
    for one in plan[:2]:
        execute(one)
    final = dataclasses.replace(CONFIG.evaluation.final, samples_per_problem=M, num_problems=N)
    config = ReadinessRunConfig(
        evaluation=dataclasses.replace(CONFIG.evaluation, final=final),
        target=str(checkpoint_directory(find_run(plan, "pretrain ce s0").directory, 6)),
        corpus=str(find_run(plan, "data").directory),
        window_tokens=128,
    )
    return plan_run("readiness", config, label="readiness", root=directory)


@pytest.fixture(scope="module")
def result(planned: PlannedRun) -> dict[str, Any]:
    execute(planned)
    return json.loads((planned.directory / "readiness.json").read_text())


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return load_task(CONFIG.evaluation.tasks["sums"], split="test", num_problems=N, seed=0, data_dir=None)


def nats(model: Any, given: list[int], following: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([given + following[:-1]])).logits[0].double()
    rows = logits.log_softmax(-1)[len(given) - 1 :]
    return (-rows[torch.arange(len(following)), torch.tensor(following)]).tolist()


def test_responses_are_counted_by_what_became_of_them(planned: PlannedRun, result: dict[str, Any]) -> None:
    task = result["tasks"]["sums"]
    grades = read_jsonl(planned.directory / "samples" / "sums.grades.jsonl")[1:]
    assert sum(task["statuses"].values()) == M * N == len(grades)
    for status, count in task["statuses"].items():
        assert count == sum(one["status"] == status for one in grades), status
    assert task["statuses"]["correct"] == sum(task["num_correct"])
    assert (task["num_samples"], len(task["problem_ids"])) == (M, N)
    assert result["decoding"] == {**dataclasses.asdict(CONFIG.evaluation.decoding), "stop": []}


def test_worked_solutions_are_read_with_their_prompts_given(
    planned: PlannedRun, result: dict[str, Any], problems: list[Problem]
) -> None:
    """Every token of a solution and the end of text once, against a dense float64 pass."""
    folder = Path(planned.config.target)
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    expected, ends = [], []
    for one in problems:
        given = encode_prompt(tokenizer, one.prompt)
        whole = encode_prompt(tokenizer, one.text)
        assert whole[: len(given)] == given
        values = nats(model, given, [*whole[len(given) :], tokenizer.eos_token_id])
        expected.append(sum(values))
        ends.append(math.exp(-values[-1]))
    solutions = result["tasks"]["sums"]["solutions"]
    # float32 logits, about 20 tokens each
    assert solutions["likelihood"]["cross_entropy_nats"] == pytest.approx(expected, rel=1e-5)
    assert solutions["likelihood"]["num_bytes"] == [len(one.solution.encode()) for one in problems]
    assert solutions["end_prob"] == pytest.approx(sum(ends) / N, rel=1e-4)
    num_tokens = sum(solutions["likelihood"]["num_tokens"])
    assert solutions["cross_entropy_nats"] == pytest.approx(sum(expected) / num_tokens, rel=1e-5)


def test_responses_are_read_as_they_were_drawn(
    planned: PlannedRun, result: dict[str, Any], problems: list[Problem]
) -> None:
    """At temperature 1 a response's likelihood is what the sampler drew it with."""
    folder = Path(planned.config.target)
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    samples = read_samples(planned.directory / "samples" / "sums.jsonl")
    documents = response_documents(tokenizer, {one.id: one for one in problems}, samples[:3])
    for document, sample in zip(documents, samples, strict=False):
        assert document.token_ids[document.num_given :].tolist() == list(sample.token_ids)
        assert document.num_predicted == sample.num_tokens
        ids = document.token_ids.tolist()
        assert sum(nats(model, ids[: document.num_given], ids[document.num_given :])) > 0
    responses = result["tasks"]["sums"]["responses"]
    assert responses["num_documents"] == N * RESPONSES_READ
    assert responses["num_tokens"] == sum(
        one.num_tokens for one in samples if one.sample_index < RESPONSES_READ
    )


def test_a_kill_changes_no_byte(
    planned: PlannedRun, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "MAX_ROWS", 2 * M)  # three batches of two problems
    whole, crashed = (dataclasses.replace(planned, directory=tmp_path / name) for name in ("whole", "killed"))
    execute(whole)
    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "sample", crash_on_call(2, True, answers_module.sample))
        with pytest.raises(Killed):
            execute(crashed)
    assert not crashed.is_done
    execute(crashed)
    for name in ("readiness.json", "samples/sums.jsonl", "samples/sums.grades.jsonl"):
        assert (crashed.directory / name).read_bytes() == (whole.directory / name).read_bytes(), name
