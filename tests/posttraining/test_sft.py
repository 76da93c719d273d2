"""Supervised fine-tuning: its tokens, its loss and update against the project's own, its resume to the byte."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.small_study import Killed, crash_on_call, last_checkpoint, make_run, outcome
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlprior.config import RunError, UsageError, decode
from rlprior.data.tokenizer import EOS, encode_documents, encode_prompt
from rlprior.models.causal_lm import load_model, load_tokenizer
from rlprior.objectives import CrossEntropy, DynamicFineTuning, Objective, RewardShaping, shaped_cross_entropy
from rlprior.posttraining import trainer as trainer_module
from rlprior.posttraining.config import SFTConfig, UpdatesConfig
from rlprior.posttraining.examples import encode_example, load_completions, read_completions
from rlprior.posttraining.sft import SFTRunConfig
from rlprior.posttraining.trainer import Conductor
from rlprior.runs.files import read_jsonl
from rlprior.seeding import shuffled_places
from rlprior.tasks.config import TaskConfig
from rlprior.training import checkpoint as checkpoint_module
from rlprior.training.checkpoint import CheckpointSaver, checkpoint_directory, tokens_seen
from rlprior.training.update import OptimizerConfig, Updater

SFT = SFTConfig(
    task=TaskConfig(difficulties=(1,)),
    num_problems=20,
    num_steps=6,
    batch_size=4,
    learning_rate=1e-2,
    save_every=2,
)


def run_config(model: Path, **changes: Any) -> SFTRunConfig:
    return SFTRunConfig(sft=dataclasses.replace(SFT, **changes), init_from=str(model))


def train(model: Path, directory: Path, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of a run."""
    run = make_run("sft", run_config(model, **changes), directory)
    return read_jsonl(run.directory / "metrics.jsonl")


@pytest.fixture(scope="module")
def model(trained: Path) -> Path:
    return last_checkpoint(trained)


# Tokens


def test_the_tokens_are_the_prompt_as_the_sampler_gets_it_the_completion_and_the_end(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    prompt, completion = "Q: 1+1\nA:", f" is 2{EOS}, not <|bos|>"
    example = encode_example(tokenizer, prompt, completion)
    ids, labels = example["input_ids"], example["labels"]
    start = encode_prompt(tokenizer, prompt)
    assert ids[: len(start)] == start
    assert labels == [-100] * len(start) + ids[len(start) :]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1], "text that spells a special token stays text"
    assert tokenizer.decode(ids[len(start) : -1]) == completion


def test_worked_solutions_are_framed_as_in_pre_training(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    completions = load_completions(dataclasses.replace(SFT, num_problems=60), seed=0, data_dir=None)
    documents = encode_documents(tokenizer, [prompt + solution for prompt, solution in completions])
    for (prompt, solution), document in zip(completions, documents, strict=True):
        assert encode_example(tokenizer, prompt, solution)["input_ids"] == document.tolist()


def test_a_file_of_pairs_is_taken_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    records = [
        {"prompt": " two ", "completion": " words\n", "source": "here"},
        {"prompt": "", "completion": "é"},
    ]
    path.write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    config = SFTConfig(path="pairs.jsonl")
    assert load_completions(config, seed=0, data_dir=tmp_path) == [(" two ", " words\n"), ("", "é")]


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"prompt": "a"}', UsageError, ":2: needs `prompt` and `completion`; it has prompt"),
        ('{"messages": []}', UsageError, ":2: needs `prompt` and `completion`; it has messages"),
        ('{"prompt": "a", "completion": 3}', RunError, ":2: `completion` must be text, not int"),
        ('{"prompt": ["a"], "completion": "b"}', RunError, ":2: `prompt` must be text, not list"),
        ('{"prompt": "a", "completion": ""}', RunError, ":2: the completion is empty"),
        ('{"prompt": "a", "completion": "\\ud800"}', RunError, ":2: character 0 is half a surrogate pair"),
        ('{"prompt": ', RunError, ":2: not JSON"),
        ("[1]", RunError, ":2: not a JSON object"),
    ],
)
def test_bad_lines_are_told_with_their_place(
    tmp_path: Path, line: str, error: type[Exception], message: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(error, match=re.escape(f"{path}{message}")):
        read_completions(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "needs one of task"),
        ({"task": {}, "path": "x"}, "and not both"),
        ({"path": "x", "num_problems": 3}, "num_problems is for a task"),
        ({"path": "x", "objective": {"name": "sampled_reward"}}, "a resumed run would not repeat"),
        ({"path": "x", "batch_size": 6, "micro_batch_size": 4}, "must divide batch_size = 6"),
        ({"path": "x", "num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"path": "x", "learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_settings_that_make_no_sense(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode(SFTConfig, table, source="sft.toml")


# The order of the examples and the learning rate


def test_each_pass_takes_every_example_once_and_goes_on_anywhere() -> None:
    whole = shuffled_places(7, range(30), 3, "examples")
    for start in range(0, 28, 7):
        assert sorted(whole[start : start + 7]) == list(range(7))
    assert whole[:7] != whole[7:14]
    for start, stop in itertools.combinations(range(0, 31, 5), 2):
        assert shuffled_places(7, range(start, stop), 3, "examples") == whole[start:stop]
    firsts = Counter(shuffled_places(7, range(1), seed, "examples")[0] for seed in range(700))
    # 100 each, standard deviation 9
    assert len(firsts) == 7
    assert min(firsts.values()) > 55


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_rate_follows_the_step(model: Path, tmp_path: Path, decay: Any) -> None:
    metrics = train(model, tmp_path / "run", decay=decay, warmup_steps=2, learning_rate=1e-4)
    rates = [record["learning_rate"] / 1e-4 for record in metrics]
    done = [0.2, 0.4, 0.6, 0.8]  # of the five steps after the warmup, the last of which is not made
    left = {
        "constant": [1.0] * 4,
        "linear": [1 - share for share in done],
        "cosine": [(1 + float(torch.cos(torch.tensor(share * torch.pi)))) / 2 for share in done],
    }
    assert rates == pytest.approx([0.5, 1.0, *left[decay]], rel=1e-6)


def test_the_number_of_steps() -> None:
    assert UpdatesConfig(num_epochs=3, batch_size=4).count_steps(8) == 6
    assert UpdatesConfig(num_epochs=1, batch_size=4).count_steps(3) == 1
    assert UpdatesConfig(num_epochs=9, num_steps=5, batch_size=4).count_steps(3) == 5


# One update


def own_loss(model: Any, examples: list[dict[str, list[int]]], objective: Objective) -> Tensor:
    """The project's loss of the completions' tokens, each row by itself, from full logits."""
    sums, num_targets = torch.zeros(()), 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(example["labels"][1:])
        sums = sums + shaped_cross_entropy(logits, targets, objective, reduction="sum")
        num_targets += int((targets != -100).sum())
    return sums / num_targets


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
@pytest.mark.parametrize(
    "objective",
    [CrossEntropy(), RewardShaping(beta=0.5, tail_reward=-0.1, top_k=20), DynamicFineTuning()],
    ids=lambda objective: objective.name,
)
def test_an_update_is_the_projects_own_on_the_same_tokens(
    model: Path, tmp_path: Path, objective: Objective, micro_batch_size: int | None
) -> None:
    changes = {"objective": objective, "micro_batch_size": micro_batch_size, "num_steps": 1}
    (record,) = train(model, tmp_path / "run", **changes, decay="constant")
    tokenizer = load_tokenizer(model)
    pairs = load_completions(SFT, seed=0, data_dir=None)
    order = shuffled_places(len(pairs), range(SFT.batch_size), 0, "examples")
    examples = [encode_example(tokenizer, *pairs[place]) for place in order]
    assert len({len(example["input_ids"]) for example in examples}) > 1, "padding has to matter"
    expected: Any = load_model(model).train()
    updater = Updater(expected, OptimizerConfig(weight_decay=0.0))
    loss = own_loss(expected, examples, objective)
    loss.backward()
    norm = updater.apply(float(loss.detach()), SFT.learning_rate, step=1)
    # float32: sums over some hundred tokens, padded rows against rows alone
    assert record["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert record["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    found = AutoModelForCausalLM.from_pretrained(checkpoint_directory(tmp_path / "run", 1))
    moved = 0.0
    for new, old in zip(found.parameters(), expected.parameters(), strict=True):
        # AdamW's first step divides the gradient by its own size, so that a tiny one may turn any way: the whole counts
        moved += float((new - old).detach().abs().mean()) / SFT.learning_rate
    assert moved / len(list(found.parameters())) < 0.01, "in units of the step"


def test_bfloat16_is_the_products_alone(model: Path, tmp_path: Path) -> None:
    exact, rounded, again = (
        train(model, tmp_path / name, precision=precision, num_steps=2)
        for name, precision in (("one", "float32"), ("bfloat16", "bfloat16"), ("two", "float32"))
    )
    assert again == exact, "accelerate keeps its settings for the whole process: they must not stick"
    losses = [[record["loss"] for record in metrics] for metrics in (exact, rounded)]
    # 8 bits of mantissa in the products, averaged over some hundred tokens
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1] != losses[0]
    last = checkpoint_directory(tmp_path / "bfloat16", 2)
    assert {weight.dtype for weight in load_file(last / "model.safetensors").values()} == {torch.float32}


def test_it_learns_and_carries_the_count_of_pre_training_tokens(model: Path, tmp_path: Path) -> None:
    metrics = train(model, tmp_path / "run", num_steps=40, batch_size=10, save_every=40)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[-1]["token_accuracy"] > metrics[0]["token_accuracy"]
    last = checkpoint_directory(tmp_path / "run", 40)
    assert tokens_seen(last) == tokens_seen(model) > 0


def test_longer_examples_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": "a", "completion": "b" * n}) + "\n" for n in (1, 2, 300))
    )
    sft = dataclasses.replace(SFT, task=None, num_problems=None, path="pairs.jsonl", num_steps=1)
    for max_tokens, num_kept in ((50, 2), (None, 3)):
        limited = dataclasses.replace(sft, max_tokens=max_tokens)
        config = SFTRunConfig(sft=limited, init_from=str(model), data_dir=str(tmp_path))
        run = make_run("sft", config, tmp_path / str(max_tokens))
        result = json.loads((run.directory / "result.json").read_text())
        assert (result["num_examples"], result["num_too_long"]) == (num_kept, 3 - num_kept)
    limited = dataclasses.replace(sft, max_tokens=2)
    with pytest.raises(RunError, match=r"each of the 3 examples is longer than max_tokens = 2; raise it"):
        make_run(
            "sft",
            SFTRunConfig(sft=limited, init_from=str(model), data_dir=str(tmp_path)),
            tmp_path / "none",
        )


def test_updates_that_are_not_finite_are_skipped_and_the_third_ends_the_run(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"step 4: the gradient was not finite 3 times in a row; lower the"):
        train(model, tmp_path / "run", learning_rate=1e30, decay="constant")
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["num_skipped"] for record in metrics] == [0, 1, 2]


# Going on


CRASHES = {
    "before anything is saved": (Conductor, "on_log", 1, False),
    "in the middle of an update": (Conductor, "on_pre_optimizer_step", 4, False),
    "after an update": (Conductor, "on_log", 4, True),
    "between weights and optimizer state": (checkpoint_module, "save_file", 2, False),
    "after the last checkpoint": (CheckpointSaver, "save", 3, True),
}


@pytest.mark.parametrize("where", CRASHES)
def test_a_crash_changes_no_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = make_run("sft", run_config(model), tmp_path / "whole")
    module, name, number, after = CRASHES[where]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, crash_on_call(number, after, getattr(module, name)))
        with pytest.raises(Killed):
            make_run("sft", run_config(model), tmp_path / "crashed")
    assert not (tmp_path / "crashed" / "result.json").exists()
    steps: list[int] = []
    original = trainer_module.Conductor.on_log

    def count(self: Any, args: Any, state: Any, *rest: Any, **options: Any) -> None:
        steps.append(state.global_step)
        original(self, args, state, *rest, **options)

    monkeypatch.setattr(trainer_module.Conductor, "on_log", count)
    resumed = make_run("sft", run_config(model), tmp_path / "crashed")
    assert outcome(resumed.directory) == outcome(whole.directory)
    if where != "before anything is saved":
        assert len(set(steps)) < 6, "it began anew instead of going on"


def test_dropout_is_a_function_of_the_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models built here have none; others do."""
    original = trainer_module.load_for_training

    def with_dropout(*arguments: Any) -> Any:
        loaded = original(*arguments)
        for module in loaded.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        return loaded

    monkeypatch.setattr(trainer_module, "load_for_training", with_dropout)
    config = run_config(model)
    whole = make_run("sft", config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSaver, "save", crash_on_call(2, True, CheckpointSaver.save))
        with pytest.raises(Killed):
            make_run("sft", config, tmp_path / "crashed")
    torch.manual_seed(12345)
    assert outcome(make_run("sft", config, tmp_path / "crashed").directory) == outcome(whole.directory)
    monkeypatch.setattr(trainer_module, "load_for_training", original)
    plain = make_run("sft", config, tmp_path / "plain")
    assert outcome(plain.directory) != outcome(whole.directory), "dropout has to have mattered"


def test_the_documented_names_are_those_that_are_logged(model: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "posttraining.md").read_text(encoding="utf-8")
    table = text.split("## What is logged each step")[1].split("`timing.jsonl`")[0]
    rows = [row.split("|") for row in table.splitlines() if row.startswith("| `")]
    documented = {name for row in rows if "sft" in row[2] for name in re.findall(r"`([\w/]+)`", row[1])}
    assert set().union(*train(model, tmp_path / "run")) == documented
    for record in read_jsonl(tmp_path / "run" / "timing.jsonl"):
        assert record.keys() == {"step", "step_seconds"}
