"""A language-model run that is killed anywhere and made again ends in the same bytes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from tests.small_study import Killed, crash_on_call, make_run, outcome, study_config

from rlprior.config import RunError
from rlprior.data.packing import Corpus
from rlprior.data.prepare import prepare
from rlprior.objectives import Objective, RewardShaping, SampledReward
from rlprior.runs.files import read_jsonl
from rlprior.training import checkpoint as checkpoint_module
from rlprior.training import language_model
from rlprior.training.checkpoint import CheckpointSaver, checkpoint_directory
from rlprior.training.language_model import LanguageModelConfig
from rlprior.training.update import Updater

CONFIG = study_config()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpus") / "corpus"
    prepare(CONFIG.data, directory)
    return Corpus.open(directory)


def stage(corpus: Corpus, **changes: Any) -> LanguageModelConfig:
    """The small study's pre-training, changed."""
    training = dataclasses.replace(CONFIG.pretrain, **changes)
    return LanguageModelConfig(training=training, corpus=str(corpus.directory), model=CONFIG.model)


CRASHES = {
    "in the middle of a step": (language_model, "train_step", 4, True),
    "before anything is saved": (language_model, "train_step", 1, True),
    "between weights and optimizer state": (checkpoint_module, "save_file", 2, False),
    "after the files, before the rename": (checkpoint_module, "sync_directory", 2, False),
    "after the rename, before pruning": (checkpoint_module, "_prune", 2, False),
    "after the last checkpoint": (CheckpointSaver, "save", 4, True),
}


@pytest.mark.parametrize("where", CRASHES)
@pytest.mark.parametrize(
    "objective",
    [RewardShaping(tail_reward=-0.1, top_k=20), SampledReward(tail_reward=-0.1)],
    ids=["exact", "sampled"],
)
def test_a_crash_changes_no_byte(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, where: str, objective: Objective
) -> None:
    config = stage(corpus, objective=objective)
    whole = make_run("pretrain", config, tmp_path / "whole")
    module, name, number, after = CRASHES[where]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, crash_on_call(number, after, getattr(module, name)))
        with pytest.raises(Killed):
            make_run("pretrain", config, tmp_path / "crashed")
    assert not (tmp_path / "crashed" / "result.json").exists()
    steps: list[int] = []
    original = language_model.train_step

    def count(*args: Any, **kwargs: Any) -> dict[str, float]:
        steps.append(kwargs["step"])
        return original(*args, **kwargs)

    monkeypatch.setattr(language_model, "train_step", count)
    resumed = make_run("pretrain", config, tmp_path / "crashed")
    assert outcome(resumed.directory) == outcome(whole.directory)
    if where != "before anything is saved":
        assert len(steps) < CONFIG.pretrain.num_steps, "it began anew instead of going on"
    assert not list((resumed.directory / "checkpoints").glob(".*"))


def test_a_finished_run_does_nothing_the_second_time(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stage(corpus)
    first = make_run("pretrain", config, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in first.directory.rglob("*")}
    monkeypatch.delattr(language_model, "train_step")
    make_run("pretrain", config, tmp_path / "run")
    assert {file: file.stat().st_mtime_ns for file in first.directory.rglob("*")} == before


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, corpus: Corpus) -> None:
    config = stage(corpus)
    whole = make_run("pretrain", config, tmp_path / "whole")
    make_run("pretrain", config, tmp_path / "damaged")
    weights = checkpoint_directory(tmp_path / "damaged", 6) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "damaged" / "result.json").unlink()
    with pytest.warns(UserWarning, match=r"step-00000006: model\.safetensors has been damaged"):
        make_run("pretrain", config, tmp_path / "damaged")
    assert outcome(tmp_path / "damaged") == outcome(whole.directory)


def test_three_steps_in_a_row_that_are_not_finite_end_the_run_wherever_it_was_interrupted(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Updater.apply

    def spoil(updater: Updater, loss: float, learning_rate: float, *, step: int) -> float:
        return original(updater, math.nan if step >= 3 else loss, learning_rate, step=step)

    monkeypatch.setattr(Updater, "apply", spoil)
    config = stage(corpus, save_every=1)
    with monkeypatch.context() as patch:
        save = crash_on_call(4, True, CheckpointSaver.save)
        patch.setattr(CheckpointSaver, "save", save)
        with pytest.raises(Killed):
            make_run("pretrain", config, tmp_path / "run")
    with pytest.raises(
        RunError, match=r"step 5: loss or gradient not finite 3 times in a row.*lower the learning rate"
    ):
        make_run("pretrain", config, tmp_path / "run")
    assert [record["num_skipped"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [
        0,
        0,
        1,
        2,
    ]
