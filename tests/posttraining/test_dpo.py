"""Direct preference optimization: its figures by hand from log-probabilities, its own answers, its resume to the byte."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.posttraining.graded import write_answers, write_store
from tests.small_study import Killed, crash_on_call, last_checkpoint, make_run, outcome
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlprior.config import RunError, UsageError, decode
from rlprior.data.tokenizer import encode_prompt
from rlprior.models.causal_lm import build_model, load_model, load_tokenizer, save_model
from rlprior.models.presets import ModelConfig
from rlprior.posttraining.config import DPOConfig, SFTConfig
from rlprior.posttraining.dpo import DPORunConfig, describe_pairs
from rlprior.posttraining.pairs import make_pairs, read_graded
from rlprior.posttraining.sft import SFTRunConfig
from rlprior.posttraining.trainer import Conductor
from rlprior.runs.files import read_jsonl
from rlprior.sampling import answers as answers_module
from rlprior.sampling.grades import grades_of
from rlprior.sampling.sampler import Decoding
from rlprior.seeding import shuffled_places
from rlprior.tasks import verifier as verifier_module
from rlprior.tasks.config import TaskConfig, load_task
from rlprior.tasks.problem import Problem, Status, Verdict
from rlprior.training import checkpoint as checkpoint_module
from rlprior.training.checkpoint import CheckpointSaver, checkpoint_directory

DPO = DPOConfig(
    task=TaskConfig(difficulties=(1,)),
    num_problems=10,
    num_steps=6,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=0,
    max_pairs_per_prompt=2,
    samples_per_problem=6,
    decoding=Decoding(max_new_tokens=8),
    save_every=2,
)


@pytest.fixture(scope="module")
def model(trained: Path) -> Path:
    return last_checkpoint(trained)


def problems() -> list[Problem]:
    return load_task(DPO.task, split="train", num_problems=DPO.num_problems, seed=0, data_dir=None)


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two right answers and a wrong one to each problem."""
    return write_answers(
        tmp_path_factory.mktemp("store") / "answers.jsonl", problems(), load_tokenizer(model)
    )


def run_config(model: Path, samples: Path | None, **changes: Any) -> DPORunConfig:
    return DPORunConfig(
        dpo=dataclasses.replace(DPO, **changes),
        init_from=str(model),
        samples=str(samples) if samples else None,
    )


def contains_digit(problem: Problem, response: str, *, truncated: bool) -> Verdict:
    """A reward that an untrained model earns now and then."""
    return Verdict(Status.CORRECT if re.search(r"\d", response) else Status.WRONG, None)


# The loss by hand


def answer_log_prob(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Sum over the answer's tokens, from the logits of the row by itself."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


LOSSES = {
    "sigmoid": lambda chosen, rejected, lengths: -logsigmoid(0.3 * (chosen - rejected)),
    "hinge": lambda chosen, rejected, lengths: torch.relu(1 - 0.3 * (chosen - rejected)),
    # a token's share of each answer, as in TRL
    "ipo": lambda chosen, rejected, lengths: (
        (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * 0.3)) ** 2
    ),
    "robust": lambda chosen, rejected, lengths: (
        -(0.9 * logsigmoid(0.3 * (chosen - rejected)) - 0.1 * logsigmoid(-0.3 * (chosen - rejected))) / 0.8
    ),
}


@pytest.mark.parametrize(
    ("loss_type", "micro_batch_size"),
    [("sigmoid", None), ("sigmoid", 2), ("hinge", None), ("ipo", 2), ("robust", None)],
)
def test_every_figure_is_that_of_the_formula(
    model: Path, store: Path, tmp_path: Path, loss_type: Any, micro_batch_size: int | None
) -> None:
    config = run_config(
        model,
        store,
        loss_type=loss_type,
        beta=0.3,
        label_smoothing=0.1 if loss_type == "robust" else 0.0,
        micro_batch_size=micro_batch_size,
        num_steps=2,
        eval_every=1,
    )
    run = make_run("dpo", config, tmp_path / "run")
    first, second = read_jsonl(run.directory / "metrics.jsonl")
    tokenizer, reference = load_tokenizer(model), load_model(model).eval()
    policy = load_model(checkpoint_directory(run.directory, 1)).eval()
    pairs, _ = make_pairs(*read_graded(store), max_pairs_per_prompt=2, seed=0)
    prompts = {problem.id: encode_prompt(tokenizer, problem.prompt) for problem in problems()}
    rows: list[list[float]] = []
    for place in shuffled_places(len(pairs), range(4, 8), 0, "examples"):
        pair = pairs[place]
        prompt, lengths = (
            prompts[pair.problem_id],
            (len(pair.chosen.token_ids), len(pair.rejected.token_ids)),
        )
        now, before = (
            [answer_log_prob(one, prompt, list(sample.token_ids)) for sample in (pair.chosen, pair.rejected)]
            for one in (policy, reference)
        )
        chosen, rejected = now[0] - before[0], now[1] - before[1]
        loss = LOSSES[loss_type](chosen, rejected, lengths)
        rows.append([float(x) for x in (loss, 0.3 * chosen, 0.3 * rejected, now[0], now[1])])
    loss, chosen, rejected, logp_chosen, logp_rejected = torch.tensor(rows).mean(0).tolist()
    expected = {
        "loss": loss,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": sum(row[1] > row[2] for row in rows) / len(rows),
        "logps/chosen": logp_chosen,
        "logps/rejected": logp_rejected,
    }
    assert abs(chosen - rejected) > 1e-3, "the model has to have moved"
    # float32: sums of some dozen log-probabilities near 5, each good to 1e-6, padded rows against rows alone
    assert {name: second[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (first["rewards/margins"], first["rewards/chosen"]) == pytest.approx((0, 0), abs=1e-5)


def test_right_answers_become_more_likely_than_wrong_ones(model: Path, store: Path, tmp_path: Path) -> None:
    run = make_run("dpo", run_config(model, store, num_steps=20, learning_rate=3e-3), tmp_path / "run")
    records = read_jsonl(run.directory / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)
    assert records[-1]["rewards/accuracies"] == 1
    assert records[-1]["rewards/margins"] > 0.5
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]


# Answers and pairs


def test_the_model_answers_itself_where_no_store_is_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier_module, "verify", contains_digit)
    config = run_config(model, None, max_pairs_per_prompt=3)
    run = make_run("dpo", config, tmp_path / "run")
    samples, grades = read_graded(run.directory / "samples" / "answers.jsonl")
    assert [one.problem_id for one in samples] == [
        problem.id for problem in problems() for _ in range(DPO.samples_per_problem)
    ]
    by_place = {(one.problem_id, one.sample_index): one.status for one in grades}
    pairs = read_jsonl(run.directory / "pairs.jsonl")
    result = json.loads((run.directory / "result.json").read_text())
    assert len(pairs) == result["num_pairs"] > 5
    for pair in pairs:
        assert by_place[pair["problem_id"], pair["chosen"]] == "correct"
        assert by_place[pair["problem_id"], pair["rejected"]] == "wrong"
    assert describe_pairs(run.directory).startswith(f"pairs: {len(pairs)} pairs from ")
    again = make_run(
        "dpo",
        dataclasses.replace(config, samples=str(run.directory / "samples" / "answers.jsonl")),
        tmp_path / "again",
    )
    assert outcome(again.directory) == outcome(run.directory), "a store is a store"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("correct", "0 without a correct answer, 10 without one to reject); take harder problems"),
        ("wrong", "10 without a correct answer, 0 without one to reject); take easier problems"),
    ],
)
def test_no_pair_is_told_in_one_line(
    model: Path, store: Path, tmp_path: Path, status: str, message: str
) -> None:
    samples, grades = read_graded(store)
    path = tmp_path / "store.jsonl"
    write_store(path, samples, [dataclasses.replace(grade, status=status) for grade in grades])
    with pytest.raises(RunError) as caught:
        make_run("dpo", run_config(model, path), tmp_path / "run")
    assert str(caught.value).startswith(f"{path}: no pair can be made: 0 pairs from 0 of 10 prompts (")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("pairs*")), "nothing half-written"


def test_a_store_of_other_problems_is_refused(model: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"answers problem \w+, which dpo\.task does not have"):
        make_run("dpo", run_config(model, store, split="test"), tmp_path / "run")
    assert grades_of(store).exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "task is missing; add it"),
        ({"task": {}, "samples_per_problem": 1}, "a pair takes two answers"),
        ({"task": {}, "rejected": []}, "rejected needs at least one verdict"),
        ({"task": {}, "rejected": ["timed_out"]}, "must be one of 'wrong', 'unparsable', 'truncated'"),
        ({"task": {}, "max_pairs_per_prompt": 0}, "max_pairs_per_prompt must be at least 1"),
        ({"task": {}, "beta": 0.0}, "beta must be above 0"),
        ({"task": {}, "loss_type": "aot"}, "loss_type must be one of 'sigmoid'"),
        ({"task": {}, "label_smoothing": 0.1}, "label_smoothing is for the loss types robust and exo_pair"),
        ({"task": {}, "loss_type": "robust", "label_smoothing": 0.5}, "below 0.5, not 0.5"),
        ({"task": {}, "loss_type": "exo_pair"}, "needs a label_smoothing above 0"),
    ],
)
def test_settings_that_make_no_sense(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        decode(DPOConfig, table, source="dpo.toml")


OTHER_LOSSES = ["sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"]


@pytest.mark.parametrize(
    "loss_type", ["exo_pair", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_LOSSES)]
)
def test_each_loss_type_is_a_sum_over_pairs(model: Path, store: Path, tmp_path: Path, loss_type: Any) -> None:
    """Which micro-batches leave alone."""
    found = []
    for micro_batch_size in (None, 1):
        config = run_config(
            model,
            store,
            loss_type=loss_type,
            label_smoothing=1e-3 if loss_type == "exo_pair" else 0.0,
            micro_batch_size=micro_batch_size,
            num_steps=2,
        )
        run = make_run("dpo", config, tmp_path / f"{micro_batch_size}")
        found.append([record["loss"] for record in read_jsonl(run.directory / "metrics.jsonl")])
    # float32, and AdamW's first step, which turns rounding of tiny gradients into steps
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)
    assert found[0][0] != found[0][1]


def test_a_mixture_of_experts_and_no_word_to_hugging_face(
    model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl.trainer.base_trainer as base

    def tell(**_: Any) -> None:
        raise AssertionError("a run of ours is nobody's business")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", tell)
    mixture = build_model(ModelConfig(preset="tiny-moe"), load_tokenizer(model), max_positions=64, seed=0)
    save_model(mixture, tmp_path / "mixture", tokenizer_directory=model)
    sft = SFTConfig(task=DPO.task, num_problems=10, num_steps=2, batch_size=4, learning_rate=1e-3)
    runs = [
        make_run("sft", SFTRunConfig(sft=sft, init_from=str(tmp_path / "mixture")), tmp_path / "sft"),
        make_run("dpo", run_config(tmp_path / "mixture", store, num_steps=2), tmp_path / "dpo"),
    ]
    for run in runs:
        first, second = read_jsonl(run.directory / "metrics.jsonl")
        assert second["loss"] < first["loss"]
        after = load_model(checkpoint_directory(run.directory, 2))
        for (name, new), old in zip(after.state_dict().items(), mixture.state_dict().values(), strict=True):
            assert torch.equal(new, old) == name.endswith("e_score_correction_bias"), name


# Going on


CRASHES = {
    "while answers are drawn": (answers_module, "write_grades", 1, False),
    "before anything is saved": (Conductor, "on_log", 1, False),
    "in the middle of an update": (Conductor, "on_pre_optimizer_step", 4, False),
    "between weights and optimizer state": (checkpoint_module, "save_file", 2, False),
    "after the last checkpoint": (CheckpointSaver, "save", 3, True),
}


@pytest.mark.parametrize("where", CRASHES)
def test_a_crash_changes_no_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The reference too is the one that the run began with."""
    monkeypatch.setattr(verifier_module, "verify", contains_digit)
    config = run_config(model, None)
    whole = make_run("dpo", config, tmp_path / "whole")
    module, name, number, after = CRASHES[where]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, crash_on_call(number, after, getattr(module, name)))
        with pytest.raises(Killed):
            make_run("dpo", config, tmp_path / "crashed")
    assert not (tmp_path / "crashed" / "result.json").exists()
    resumed = make_run("dpo", config, tmp_path / "crashed")
    assert outcome(resumed.directory) == outcome(whole.directory)
    for name in ("pairs.jsonl", "samples/answers.jsonl", "samples/answers.grades.jsonl"):
        assert (resumed.directory / name).read_bytes() == (whole.directory / name).read_bytes()


def test_the_documented_names_are_those_that_are_logged(model: Path, store: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "posttraining.md").read_text(encoding="utf-8")
    table = text.split("## What is logged each step")[1].split("`timing.jsonl`")[0]
    rows = [row.split("|") for row in table.splitlines() if row.startswith("| `")]
    documented = {name for row in rows if "dpo" in row[2] for name in re.findall(r"`([\w/]+)`", row[1])}
    run = make_run("dpo", run_config(model, store), tmp_path / "run")
    assert set().union(*read_jsonl(run.directory / "metrics.jsonl")) == documented
