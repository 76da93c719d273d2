"""Every option that is written for verl is one of its own, and every setting of ours is thought of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from tests.rl.verl.verl_cases import load_schema, run_config, strangers, written_options

from rlprior.config import HOW, UsageError
from rlprior.rl.config import LengthPhase, RLConfig, RolloutConfig
from rlprior.rl.loop import RLRunConfig
from rlprior.rl.verl.export import render_configuration
from rlprior.rl.verl.settings import Prompts, check_exportable, counterparts, phases_of, verl_options
from rlprior.tasks.config import TaskConfig
from rlprior.tasks.problem import Problem
from rlprior.training.engine import EngineConfig
from rlprior.training.update import OptimizerConfig

PROMPTS = Prompts(num_training=100, num_validation=10, max_tokens=12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"length_schedule": (LengthPhase(max_new_tokens=16384),), "num_steps": 1000, "eval_every": 100},
        {"dynamic_sampling": "off", "old_log_probs": "sampler", "warmup_steps": 5},
        {"loss_aggregation": "grpo", "importance_cap": 2.0, "entropy_bonus": 0.01, "precision": "bfloat16"},
        {"loss_aggregation": "dr_grpo", "scale_rewards": "none", "importance_cap": math.inf},
        {
            "rollout": RolloutConfig(engine="vllm", gpu_memory_utilization=0.4),
            "old_log_probs": "sampler",
            "engine": EngineConfig(activation_checkpointing="full"),
        },
        {"optimizer": OptimizerConfig(weight_decay=0.1, beta2=0.99, epsilon=1e-6), "learning_rate": 1e-3},
    ],
)
def test_every_option_is_one_of_verls(settings: dict[str, Any]) -> None:
    schema, config = load_schema(), run_config(**settings)
    for phase in phases_of(config.rl):
        options = verl_options(config, phase, PROMPTS, experiment="run")
        assert strangers(options, schema) == []
        # what a reader of the file gets is what was meant: no number has become text
        assert written_options(render_configuration(options), schema) == options


def test_a_misspelt_option_and_a_wrong_type_are_found() -> None:
    schema, config = load_schema(), run_config()
    options = verl_options(config, phases_of(config.rl)[0], PROMPTS, experiment="run")
    for name, value in options.items():
        others = {key: other for key, other in options.items() if key != name}
        assert strangers({**others, name + "s": value}, schema) == [name + "s"]
        if schema[name] != "any":
            assert strangers({**others, name: object()}, schema) == [name]
    assert strangers({"data.train_batch_size": "128"}, schema) == ["data.train_batch_size"]
    assert strangers({"trainer.use_v1": 1}, schema) == ["trainer.use_v1"]


def test_options_hold_the_settings() -> None:
    config = run_config(
        prompts_per_step=5,
        samples_per_prompt=7,
        temperature=0.9,
        clip_low=0.1,
        clip_high=0.3,
        learning_rate=2e-6,
        optimizer=OptimizerConfig(
            beta1=0.8, beta2=0.9, epsilon=1e-7, weight_decay=0.0, max_gradient_norm=2.0
        ),
        save_every=3,
        eval_every=2,
    )
    options = verl_options(config, phases_of(config.rl)[1], PROMPTS, experiment="run")
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    expected = {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        "algorithm.filter_groups.enable": True,
        "algorithm.filter_groups.metric": "acc",
        "algorithm.rollout_correction.bypass_mode": False,
        f"{actor}.use_kl_loss": False,
        f"{actor}.loss_agg_mode": "token-mean",
        f"{actor}.clip_ratio_low": 0.1,
        f"{actor}.clip_ratio_high": 0.3,
        f"{actor}.ppo_mini_batch_size": 5,
        f"{actor}.ppo_epochs": 1,
        f"{actor}.optim.lr": 2e-6,
        f"{actor}.optim.betas": [0.8, 0.9],
        f"{actor}.optim.override_optimizer_config": {"eps": 1e-7},
        f"{actor}.optim.clip_grad": 2.0,
        f"{rollout}.n": 7,
        f"{rollout}.temperature": 0.9,
        f"{rollout}.max_model_len": 12 + 16,
        "data.train_batch_size": 5,
        "data.max_prompt_length": 12,
        "data.max_response_length": 16,
        "trainer.total_training_steps": 10,
        "trainer.save_freq": 3,
        "trainer.test_freq": 2,
    }
    assert {name: options[name] for name in expected} == expected


REFUSED = {"rl.signal", "rl.mask_truncated"}
"""Settings that verl has nothing for: only their defaults are exported."""


def test_every_setting_has_a_counterpart_or_is_refused() -> None:
    """A setting added to the loop has to be thought of here, or the export would silently run something else."""
    known = set(counterparts(run_config(), LengthPhase(until_step=1, max_new_tokens=1), PROMPTS))
    settings = {f"rl.{option.name}" for option in dataclasses.fields(RLConfig)} - {
        "rl.optimizer",
        "rl.rollout",
    }
    settings |= {f"rl.optimizer.{option.name}" for option in dataclasses.fields(OptimizerConfig)}
    settings |= {f"rl.rollout.{option.name}" for option in dataclasses.fields(RolloutConfig)}
    assert known == (settings | {"seed"}) - REFUSED
    # and so has a field of a problem that graders may read: the reward knows answer and choices (`written_answer` is for verifiers that
    # are refused, `group` is for tables, and `reference` for benchmarks, which are no tasks of reinforcement learning)
    assert {option.name for option in dataclasses.fields(Problem)} == {
        "id",
        "task",
        "difficulty",
        "prompt",
        "solution",
        "answer",
        "choices",
        "written_answer",
        "group",
        "reference",
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class NovelConfig(RLConfig):
    """Settings of a later day."""

    novelty: float = 0.0
    pace: int = dataclasses.field(default=1, metadata=HOW)


def test_a_setting_without_counterpart_is_refused_unless_it_is_at_its_default() -> None:
    rl = run_config().rl
    settings = {option.name: getattr(rl, option.name) for option in dataclasses.fields(rl)}
    # speed and memory are verl's own affair
    check_exportable(RLRunConfig(rl=NovelConfig(**settings, pace=2), init_from="policy"), num_training=30)
    with pytest.raises(UsageError, match=r"rl\.novelty = 0\.5 has no counterpart in verl 0\.9; leave it out"):
        check_exportable(
            RLRunConfig(rl=NovelConfig(**settings, novelty=0.5), init_from="policy"), num_training=30
        )


def test_what_verl_cannot_do_is_refused() -> None:
    changes: dict[str, Any] = {"signal": "negative", "mask_truncated": True}
    for name, value in changes.items():
        assert f"rl.{name}" in REFUSED
        with pytest.raises(
            UsageError, match=rf"rl\.{name} = {value!r} has no counterpart in verl 0\.9; leave it out"
        ):
            check_exportable(run_config(**{name: value}), num_training=30)
    task = TaskConfig(verifier="math")
    with pytest.raises(UsageError, match=r"rl\.task\.verifier = 'math' has no counterpart in verl 0\.9"):
        check_exportable(run_config(task=task), num_training=30)
    with pytest.raises(UsageError, match=r"rl\.precision = 'float32': verl computes in bfloat16"):
        check_exportable(run_config(precision="float32"), num_training=30)
    with pytest.raises(UsageError, match=r"dynamic_sampling = 'drop'.*write 'refill' or 'off'"):
        check_exportable(run_config(dynamic_sampling="drop"), num_training=30)
    with pytest.raises(UsageError, match="prompts_per_step = 31, but there are 30 training problems"):
        check_exportable(run_config(prompts_per_step=31), num_training=30)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(5, [(5, 8)]), (6, [(6, 8)]), (7, [(6, 8), (7, 16)]), (10, [(6, 8), (10, 16)])],
)
def test_phases_end_where_the_schedule_says(num_steps: int, expected: list[tuple[int, int]]) -> None:
    rl = run_config(num_steps=num_steps).rl
    phases = phases_of(rl)
    assert [(phase.until_step, phase.max_new_tokens) for phase in phases] == expected
    ends = [0, *(phase.until_step or 0 for phase in phases)]
    for phase, start, end in zip(phases, ends, ends[1:], strict=False):
        assert {rl.max_new_tokens(step) for step in range(start + 1, end + 1)} == {phase.max_new_tokens}


@pytest.mark.parametrize("num_training", [4, 5, 30, 1000])
def test_verl_makes_enough_passes_for_all_steps(num_training: int) -> None:
    config = run_config(num_steps=10, prompts_per_step=4)
    prompts = dataclasses.replace(PROMPTS, num_training=num_training)
    options = verl_options(config, phases_of(config.rl)[-1], prompts, experiment="run")
    # verl stops before step s where (s - 1) // (problems // batch) reaches total_epochs
    assert (10 - 1) // (num_training // 4) < options["trainer.total_epochs"]


def test_the_loss_of_each_phase() -> None:
    """Dr. GRPO divides by the longest response allowed, which is another one in each phase."""
    config = run_config(
        loss_aggregation="dr_grpo", scale_rewards="none", importance_cap=3.0, entropy_bonus=0.1
    )
    first, second = (verl_options(config, phase, PROMPTS, experiment="run") for phase in phases_of(config.rl))
    actor = "actor_rollout_ref.actor"
    assert first[f"{actor}.loss_agg_mode"] == second[f"{actor}.loss_agg_mode"] == "seq-mean-token-sum-norm"
    assert (first[f"{actor}.loss_scale_factor"], second[f"{actor}.loss_scale_factor"]) == (8, 16)
    assert first["algorithm.norm_adv_by_std_in_grpo"] is False
    assert first["algorithm.rollout_correction.rollout_is"] == "token"
    assert first["algorithm.rollout_correction.rollout_is_threshold"] == 3.0
    assert first[f"{actor}.entropy_coeff"] == 0.1
