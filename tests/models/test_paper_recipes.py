"""The recipe files against what the two papers print, typed here from the papers and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlprior.config import decode, encode, load_config, read_toml
from rlprior.rl.config import LengthPhase
from rlprior.rl.loop import RLRunConfig
from rlprior.study.config import TrainFile
from rlprior.training.schedule import learning_rate

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "paper"


@dataclass(frozen=True, kw_only=True)
class PublishedTraining:
    """What a paper says of one language-model stage; None where it says nothing."""

    tokens_billions: float
    batch_millions: int
    sequence_length: int
    first_rate: float
    last_rate: float
    warmup_steps: int | None
    form: str | None
    rope_base: float | None
    weight_decay: float | None
    gradient_clip: float | None
    tokens_between_results_billions: float | None


@dataclass(frozen=True, kw_only=True)
class PublishedRL:
    """Diversity or Precision?, appendix B.1 and the columns of Tables 14 to 23."""

    steps_of_first_length: int = 700
    first_length_thousands: int = 8
    second_length_thousands: int = 16
    last_step: int = 1000
    steps_between_results: int = 100
    batch_size: int = 128
    samples: int = 16
    temperature: float = 1.0
    learning_rate: float = 1e-6


TRAINING = {
    # Diversity or Precision?, appendix A.1; columns of Tables 2 and 10
    "pretrain": PublishedTraining(
        tokens_billions=500,
        batch_millions=16,
        sequence_length=4096,
        first_rate=3e-4,
        last_rate=3e-4,
        warmup_steps=2000,
        form=None,
        rope_base=1e4,
        weight_decay=0.1,
        gradient_clip=1.0,
        tokens_between_results_billions=125,
    ),
    "midtrain": PublishedTraining(
        tokens_billions=100,
        batch_millions=16,
        sequence_length=16384,
        first_rate=3e-4,
        last_rate=3e-5,
        warmup_steps=None,
        form=None,
        rope_base=1e6,
        weight_decay=0.1,
        gradient_clip=1.0,
        tokens_between_results_billions=25,
    ),
    # ReMiT, appendix D.1 and D.2
    "remit-olmo2-1b": PublishedTraining(
        tokens_billions=50,
        batch_millions=2,
        sequence_length=4096,
        first_rate=3e-4,
        last_rate=1e-7,
        warmup_steps=None,
        form="cosine",
        rope_base=None,
        weight_decay=None,
        gradient_clip=None,
        tokens_between_results_billions=None,
    ),
    "remit-smollm3-3b": PublishedTraining(
        tokens_billions=50,
        batch_millions=2,
        sequence_length=8192,
        first_rate=2e-4,
        last_rate=1e-7,
        warmup_steps=None,
        form="cosine",
        rope_base=None,
        weight_decay=None,
        gradient_clip=None,
        tokens_between_results_billions=None,
    ),
    "remit-youtu-llm-2b": PublishedTraining(
        tokens_billions=50,
        batch_millions=64,
        sequence_length=8192,
        first_rate=2e-4,
        last_rate=1e-7,
        warmup_steps=None,
        form="cosine",
        rope_base=None,
        weight_decay=None,
        gradient_clip=None,
        tokens_between_results_billions=None,
    ),
}
# what the papers leave open, and what every recipe therefore sets for itself
OURS = {"data", "model.preset", "model.initializer_range", "model.balancing_rate", "training.mixture"}
OURS |= {"training.micro_batch_tokens"}
OURS_IN_RL = {
    "rl.task",
    "rl.num_problems",
    "rl.micro_batch_rows",
    "rl.old_log_probs",
    "rl.clip_low",
    "rl.clip_high",
}


def keys_of(table: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{where}{key}.")
        else:
            yield f"{where}{key}"


def unchecked(name: str, checked: set[str], ours: set[str]) -> list[str]:
    """Keys of a recipe that are neither compared with the paper nor known to be ours."""
    return [
        key
        for key in keys_of(read_toml(RECIPES / f"{name}.toml"))
        if not any(key == known or key.startswith(f"{known}.") for known in checked | ours)
    ]


def test_every_recipe_is_compared() -> None:
    assert {path.stem for path in RECIPES.iterdir()} == {*TRAINING, "rl"}


@pytest.mark.parametrize("name", TRAINING)
def test_training_is_as_published(name: str) -> None:
    paper = TRAINING[name]
    file = decode(TrainFile, read_toml(RECIPES / f"{name}.toml"), source=name)
    training, schedule = file.training, file.training.schedule
    # "16M" is read as 16 x 2^20, a multiple of every sequence length
    assert training.batch_tokens == paper.batch_millions * 2**20
    assert training.sequence_length == paper.sequence_length
    # to one part in a thousand: steps are whole, and between results there are as many
    assert training.num_tokens == pytest.approx(paper.tokens_billions * 1e9, rel=1e-3)
    if paper.tokens_between_results_billions:
        between = training.eval_every * training.batch_tokens
        assert between == pytest.approx(paper.tokens_between_results_billions * 1e9, rel=1e-3)
        assert training.num_steps % training.eval_every == 0
    rates = [
        learning_rate(schedule, step, training.num_steps)
        for step in range((paper.warmup_steps or 0) + 1, training.num_steps + 1)
    ]
    # the first step of a decay is already below its start
    assert rates[0] == pytest.approx(paper.first_rate, rel=2e-3)
    assert rates[-1] == pytest.approx(paper.last_rate, rel=1e-9)
    assert rates == sorted(rates, reverse=True)
    # a decay is the whole stage; where no form is stated it is linear
    assert schedule.decay_steps == (training.num_steps if paper.last_rate < paper.first_rate else 0)
    assert schedule.decay == (paper.form or "linear")
    if paper.warmup_steps:
        assert learning_rate(schedule, paper.warmup_steps // 2, training.num_steps) == paper.first_rate / 2
    rope_base = file.model.rope_theta if name == "pretrain" else training.rope_theta
    assert rope_base == paper.rope_base
    stated = (paper.weight_decay, paper.gradient_clip)
    # where ReMiT states none they are the first paper's
    expected = (0.1, 1.0) if stated == (None, None) else stated
    assert (training.optimizer.weight_decay, training.optimizer.max_gradient_norm) == expected
    # the baseline of both papers; the other objectives are the command line's
    assert encode(training.objective) == {"name": "cross_entropy"}
    checked = {"training.num_steps", "training.batch_tokens", "training.sequence_length"}
    checked |= {"training.schedule", "training.objective"}
    if paper.rope_base:
        checked |= {"model.rope_theta" if name == "pretrain" else "training.rope_theta"}
    if paper.tokens_between_results_billions:
        checked |= {"training.eval_every"}
    # of the optimizer both papers state the same two settings or none
    checked |= {"training.optimizer.weight_decay", "training.optimizer.max_gradient_norm"}
    assert unchecked(name, checked, OURS) == []


def test_the_papers_objectives_are_the_overrides_that_the_recipe_prints() -> None:
    """beta, the reward of the head (lambda-tilde) and of the tail (lambda-hat), k: captions of Tables 2 to 13."""
    path = RECIPES / "pretrain.toml"
    overrides = re.findall(r"--(training\.objective)='(.*)'", path.read_text())
    chosen: list[Any] = [
        load_config(TrainFile, path, [f"{key}={value}"]).training.objective for key, value in overrides
    ]
    assert [(c.beta, c.head_reward, c.tail_reward, c.top_k) for c in chosen] == [
        (-0.25, 0, 0, 100),
        (0.5, 0, 0, 100),
        (0, 0, -0.1, 100),
        (0, 0.1, 0, 100),
    ]


def test_reinforcement_learning_is_as_published() -> None:
    paper = PublishedRL()
    tables = {**read_toml(RECIPES / "rl.toml"), "init_from": "MODEL"}
    rl = decode(RLRunConfig, tables, source="rl").rl
    assert rl.length_schedule == (
        LengthPhase(
            until_step=paper.steps_of_first_length, max_new_tokens=paper.first_length_thousands * 1024
        ),
        LengthPhase(max_new_tokens=paper.second_length_thousands * 1024),
    )
    assert (rl.num_steps, rl.eval_every) == (paper.last_step, paper.steps_between_results)
    assert (rl.prompts_per_step, rl.samples_per_prompt) == (paper.batch_size, paper.samples)
    assert (rl.temperature, rl.learning_rate) == (paper.temperature, paper.learning_rate)
    assert rl.warmup_steps == 0  # "constant learning rate"
    assert rl.dynamic_sampling == "refill"
    # clip-higher "following Yu et al. (2025)", DAPO, arXiv:2503.14476, section 4.1
    assert (rl.clip_low, rl.clip_high) == (0.2, 0.28)
    checked = {
        f"rl.{key}"
        for key in (
            "length_schedule",
            "num_steps",
            "eval_every",
            "prompts_per_step",
            "samples_per_prompt",
            "temperature",
            "learning_rate",
            "warmup_steps",
            "dynamic_sampling",
        )
    }
    assert unchecked("rl", checked, OURS_IN_RL | {"rl.optimizer"}) == []
