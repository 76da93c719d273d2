"""What is logged, against its definitions in docs/training.md: names, loss spikes, tokens by source, experts' load, MFU."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.small_study import Killed, crash_on_call, make_run, outcome, study_config
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from rlprior.data.packing import Corpus
from rlprior.data.prepare import prepare
from rlprior.models.causal_lm import huggingface_config, new_model
from rlprior.models.presets import PRESETS, ModelConfig, training_flops_per_token
from rlprior.runs.files import read_jsonl
from rlprior.study.plan import PlannedRun
from rlprior.training import language_model, spikes
from rlprior.training.checkpoint import checkpoint_directory, list_checkpoints
from rlprior.training.language_model import LanguageModelConfig
from rlprior.training.spikes import SpikeCounter
from rlprior.training.throughput import PEAKS, model_flops_per_token, peak_flops_per_second
from rlprior.training.update import Updater

CONFIG = study_config()
EXPERTS = dataclasses.replace(CONFIG.model, num_experts=4, num_experts_per_token=2)
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpus") / "corpus"
    prepare(CONFIG.data, directory)
    return Corpus.open(directory)


def train(directory: Path, corpus: Corpus, model: ModelConfig = CONFIG.model, **changes: Any) -> PlannedRun:
    training = dataclasses.replace(CONFIG.pretrain, **changes)
    config = LanguageModelConfig(training=training, corpus=str(corpus.directory), model=model)
    return make_run("pretrain", config, directory)


def records_of(run: PlannedRun, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return read_jsonl(run.directory / name)


# Names


def documented_tables() -> list[set[str]]:
    """Names in the first column of each table of the section: every run's, a mixture of experts', wall-clock."""
    section = DOCUMENTATION.read_text(encoding="utf-8").split("## What is logged\n")[1].split("\n## ")[0]
    tables = [
        part for part in re.split(r"\n\n", section) if part.startswith("| name |") and part.count("\n") > 1
    ]
    return [
        {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
        for table in tables
    ]


def test_the_documented_names_are_those_that_are_logged(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_run, experts, wall_clock = documented_tables()
    # a GPU whose speed is known, as far as the log can tell
    monkeypatch.setattr(language_model, "peak_flops_per_second", lambda name: 1e12)
    dense, mixture = train(tmp_path / "dense", corpus), train(tmp_path / "moe", corpus, EXPERTS)
    for run, expected in ((dense, every_run), (mixture, every_run | experts)):
        for record in records_of(run):
            assert record.keys() == expected
        for record in records_of(run, "timing.jsonl"):
            assert record.keys() == {"step", *wall_clock}


# Loss spikes


def count_spikes(losses: list[float]) -> list[int]:
    counter, counts = SpikeCounter(), []
    for loss in losses:
        counter.add(loss)
        counts.append(counter.num_spikes)
    return counts


def test_a_spike_is_what_the_definition_says() -> None:
    rng = np.random.default_rng(0)
    losses = (5 + rng.standard_normal(400)).tolist()
    for step in (60, 150, 151, 230, 320):
        losses[step] += 8
    losses[200] = math.nan
    losses[205] = math.inf
    expected, num, finite = [], 0, []
    for loss in losses:
        if math.isfinite(loss):
            if len(finite) >= 100:
                num += loss > np.mean(finite[-100:]) + 4 * np.std(finite[-100:])
            finite.append(loss)
        expected.append(num)
    assert count_spikes(losses) == expected
    # 60 comes before the window is full; the others stand out by 8 of their standard deviations, 151 after 150 too
    assert expected[-1] == 4
    assert expected[149:152] == [0, 1, 2]


def test_just_below_four_deviations_is_no_spike() -> None:
    window = [1.0, 3.0] * 50  # mean 2, standard deviation 1, both exact
    assert count_spikes([*window, 6.0])[-1] == 0
    assert count_spikes([*window, math.nextafter(6.0, 7.0)])[-1] == 1
    assert count_spikes([*window[1:], 100.0])[-1] == 0, "99 losses are too few"


def test_spikes_are_the_same_bytes_after_a_crash(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step's loss jumps, after a checkpoint in whose state the window is."""
    monkeypatch.setattr(spikes, "WINDOW_STEPS", 2)
    monkeypatch.setattr(spikes, "NUM_DEVIATIONS", 1.0)
    original = language_model.train_step

    def jump(*args: Any, **kwargs: Any) -> dict[str, float]:
        measured = original(*args, **kwargs)
        return {**measured, "loss": measured["loss"] + 10.0 * (kwargs["step"] == 3)}

    monkeypatch.setattr(language_model, "train_step", jump)
    whole = train(tmp_path / "whole", corpus)
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "train_step", crash_on_call(3, False, jump))
        with pytest.raises(Killed):
            train(tmp_path / "crashed", corpus)
    (checkpoint,) = list_checkpoints(tmp_path / "crashed")
    assert checkpoint.step == 2
    assert len(checkpoint.state["recent_losses"]) == 2
    resumed = train(tmp_path / "crashed", corpus)
    assert outcome(resumed.directory) == outcome(whole.directory)
    assert [record["num_spikes"] for record in records_of(resumed)][:3] == [0, 0, 1]


# Tokens by source, experts


def test_tokens_by_source_add_up_in_the_proportion_of_the_mixture(tmp_path: Path, corpus: Corpus) -> None:
    run = train(tmp_path, corpus, mixture={"sums": 3, "stories": 1})
    for record in records_of(run):
        # 4 rows of 64 tokens a step, one of them stories
        step = record["step"]
        assert record["tokens_by_source"] == {"sums": 192 * step, "stories": 64 * step}
        assert record["tokens"] == 256 * step


def test_the_load_of_experts_is_logged_but_not_of_a_skipped_step(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Updater.apply

    def spoil(updater: Updater, loss: float, learning_rate: float, *, step: int) -> float:
        return original(updater, math.nan if step == 2 else loss, learning_rate, step=step)

    monkeypatch.setattr(Updater, "apply", spoil)
    first, second, third, *_ = records_of(train(tmp_path, corpus, EXPERTS))
    assert second["num_skipped"] == 1
    assert not {"relative_load", "max_violation_mean"} & second.keys()
    for record in (first, third):
        load = np.array(record["relative_load"])
        assert load.shape == (EXPERTS.shape.num_layers, 4)
        # 3 decimals
        assert load.mean(1) == pytest.approx(1, abs=5e-4)
        assert load.max() - 1 == pytest.approx(record["max_violation_max"], abs=5e-4)


# MFU


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_of_a_model_are_those_of_its_shape(preset: str) -> None:
    """But for the norms, which a shape counts as if they were matrices."""
    shape, vocab_size = PRESETS[preset], 1000
    with torch.device("meta"):
        model: Any = new_model(huggingface_config(shape, vocab_size, max_position_embeddings=64))
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim < 2)
    expected = training_flops_per_token(shape, vocab_size, 64) - 6.0 * norms
    assert model_flops_per_token(model, 64) == pytest.approx(expected, rel=1e-12)


def test_flops_of_models_without_a_preset() -> None:
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        llama, tied, gpt2, mixtral = (
            AutoModelForCausalLM.from_config(config)
            for config in (
                LlamaConfig(**small, intermediate_size=32, num_key_value_heads=2),
                LlamaConfig(**small, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=True),
                GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
                MixtralConfig(
                    **small,
                    intermediate_size=8,
                    num_key_value_heads=4,
                    num_local_experts=4,
                    num_experts_per_tok=2,
                ),
            )
        )
    attention = 6 * 2 * 16 * 10  # 6 L H d T
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32
    assert model_flops_per_token(llama, 10) == 6 * (2 * layer + 50 * 16) + attention
    assert model_flops_per_token(tied, 10) == model_flops_per_token(llama, 10)
    # fused query, key and value; two matrices of 4 D; learned positions are looked up
    assert model_flops_per_token(gpt2, 10) == 6 * (2 * 12 * 16 * 16 + 50 * 16) + attention
    routed = 4 * 16 * 16 + 4 * 16 + 2 * 3 * 16 * 8  # two of four experts, and the router
    assert model_flops_per_token(mixtral, 10) == 6 * (2 * routed + 50 * 16) + attention
    mixtral.config.num_experts_per_tok = 0
    assert model_flops_per_token(mixtral, 10) is None


def test_peaks_are_found_by_the_names_that_torch_gives() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100-PCIE-40GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835.5e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA H200 NVL": 835.5e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA GeForce RTX 4090": None,
        "cpu": None,
    }
    assert {name: peak_flops_per_second(name) for name in names} == names
    assert all(1e14 < peak.bfloat16 < 1e16 and 1e13 < peak.float32 < 1e15 for peak in PEAKS.values())


def test_mfu_is_flops_of_the_tokens_over_the_peak_and_left_out_where_the_peak_is_unknown(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path / "cpu", corpus)
    assert all(record.keys() == {"step", "tokens_per_second"} for record in records_of(run, "timing.jsonl"))
    monkeypatch.setattr(language_model, "peak_flops_per_second", lambda name: 1e12)
    run = train(tmp_path / "known", corpus)
    model = AutoModelForCausalLM.from_pretrained(checkpoint_directory(run.directory, 6))
    flops = model_flops_per_token(model, CONFIG.pretrain.sequence_length)
    assert flops is not None
    for record in records_of(run, "timing.jsonl"):
        assert record["mfu"] == pytest.approx(flops * record["tokens_per_second"] / 1e12, rel=1e-12)
