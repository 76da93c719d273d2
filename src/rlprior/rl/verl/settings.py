"""Settings of a reinforcement-learning run as options of verl 0.9, and what each of them becomes there.

Source: https://github.com/verl-project/verl, tag v0.9.0: `verl/trainer/config/ppo_trainer.yaml`, the trainer that it starts by default
(`trainer.use_v1`), `verl/trainer/ppo/core_algos.py` and `verl/trainer/ppo/v1/replay_buffer.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rlprior.config import UsageError
from rlprior.rl.config import LengthPhase, RLConfig
from rlprior.rl.loop import RLRunConfig

VERL_VERSION = "0.9"

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"

# verl limits the ratio to exp(20) < 5e8: at this bound its second clip, of negative advantages, never acts
NO_DUAL_CLIP = 1e9

MIN_TOKENS_PER_GPU = 16384
"""Longest packed row of a forward pass, where no single response is longer; verl's own default."""

FIXED: dict[str, Any] = {
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.clip_ratio_c": NO_DUAL_CLIP,
    f"{ACTOR}.calculate_entropy": True,
    f"{ACTOR}.ppo_epochs": 1,
    f"{ACTOR}.shuffle": False,
    f"{ACTOR}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
    f"{ACTOR}.optim.lr_scheduler_type": "constant",
    "actor_rollout_ref.model.path": "${export_dir}/model",
    f"{ROLLOUT}.top_p": 1.0,
    f"{ROLLOUT}.top_k": -1,
    f"{ROLLOUT}.calculate_log_probs": True,
    f"{ROLLOUT}.tensor_model_parallel_size": 1,
    f"{ROLLOUT}.val_kwargs.do_sample": True,
    f"{ROLLOUT}.val_kwargs.top_p": 1.0,
    f"{ROLLOUT}.val_kwargs.top_k": -1,
    f"{ROLLOUT}.val_kwargs.n": 1,
    "data.train_files": "${export_dir}/train.parquet",
    "data.val_files": "${export_dir}/validation.parquet",
    "data.shuffle": True,
    "reward.custom_reward_function.path": "${export_dir}/reward.py",
    "reward.custom_reward_function.name": "compute_score",
    "reward.reward_manager.name": "naive",
    "trainer.use_v1": True,
    "trainer.v1.trainer_mode": "sync",
    "trainer.project_name": "rlprior",
    "trainer.logger": ["console"],
    "trainer.default_local_dir": "${export_dir}/checkpoints",
    "trainer.resume_mode": "auto",
}
"""What no setting of ours decides."""

LOSS_AGGREGATIONS = {
    "dapo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}

_TASK_SETTINGS = tuple(f"rl.task.{name}" for name in ("kind", "families", "difficulties", "path", "limit"))
"""What decides which problems there are: the parquet files hold them."""


@dataclass(frozen=True)
class Counterpart:
    """What one setting becomes: options of verl by dotted name (none where it has none), and what differs."""

    options: dict[str, Any] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What has to be known of the data: how many problems of both kinds, and tokens of the longest prompt of all."""

    num_training: int
    num_validation: int
    max_tokens: int


def phases_of(rl: RLConfig) -> list[LengthPhase]:
    """The phases of the length schedule that the run reaches, each with its last step.

    >>> from rlprior.tasks.config import TaskConfig
    >>> [(phase.until_step, phase.max_new_tokens) for phase in phases_of(RLConfig(task=TaskConfig()))]
    [(700, 8192), (1000, 16384)]
    """
    reached: list[LengthPhase] = []
    for phase in rl.length_schedule:
        end = rl.num_steps if phase.until_step is None else min(phase.until_step, rl.num_steps)
        reached.append(dataclasses.replace(phase, until_step=end))
        if end == rl.num_steps:
            break
    return reached


def check_exportable(config: RLRunConfig, *, num_training: int) -> None:
    """Raise UsageError, in one line, for what verl cannot do."""
    rl = config.rl
    if rl.dynamic_sampling == "drop":
        raise UsageError(
            "rl.dynamic_sampling = 'drop': verl replaces the groups it drops, or drops none; write 'refill' or 'off'"
        )
    if rl.precision == "float32":
        raise UsageError(
            "rl.precision = 'float32': verl computes in bfloat16, with weights in float32; write 'bfloat16' or leave it out"
        )
    if rl.prompts_per_step > num_training:
        raise UsageError(
            f"rl.prompts_per_step = {rl.prompts_per_step}, but there are {num_training} training problems and verl takes a batch "
            f"from one pass over them; write at most {num_training}"
        )
    facts = Prompts(num_training=num_training, num_validation=1, max_tokens=1)
    known = {*counterparts(config, phases_of(rl)[0], facts), *_TASK_SETTINGS}
    default = type(rl)(task=rl.task)
    for section, given, usual in (
        ("rl", rl, default),
        ("rl.optimizer", rl.optimizer, default.optimizer),
        ("rl.rollout", rl.rollout, default.rollout),
        ("rl.task", rl.task, type(rl.task)(kind=rl.task.kind, path=rl.task.path)),
    ):
        for option in dataclasses.fields(given):
            name, value = f"{section}.{option.name}", getattr(given, option.name)
            # what says how, and not what is computed, is verl's own affair; sections have a turn of their own
            if name in known or "how" in option.metadata or dataclasses.is_dataclass(value):
                continue
            if value != getattr(usual, option.name):
                raise UsageError(
                    f"{name} = {value!r} has no counterpart in verl {VERL_VERSION}; leave it out"
                )


def counterparts(config: RLRunConfig, phase: LengthPhase, prompts: Prompts) -> dict[str, Counterpart]:
    """What every setting of a run becomes in one phase, by its dotted name in our file."""
    rl = config.rl
    return {
        **_data(config, prompts),
        **_sampling(rl, phase, prompts),
        **_loss(rl, phase),
        **_optimizer(rl),
        **_bookkeeping(rl, phase, prompts),
    }


def _data(config: RLRunConfig, prompts: Prompts) -> dict[str, Counterpart]:
    rl = config.rl
    return {
        "rl.task": Counterpart({"data.max_prompt_length": prompts.max_tokens}, "`train.parquet`"),
        "rl.num_problems": Counterpart(
            remark=f"{prompts.num_training} rows of `train.parquet`, in our order before verl shuffles"
        ),
        "seed": Counterpart(
            {"data.seed": config.seed}, "the same problems; their order and the samples are verl's own"
        ),
        "rl.prompts_per_step": Counterpart(
            {
                "data.train_batch_size": rl.prompts_per_step,
                f"{ACTOR}.ppo_mini_batch_size": rl.prompts_per_step,
            },
            "both count prompts: one update a rollout",
        ),
    }


def _sampling(rl: RLConfig, phase: LengthPhase, prompts: Prompts) -> dict[str, Counterpart]:
    longest = prompts.max_tokens + phase.max_new_tokens
    is_filtered = rl.dynamic_sampling == "refill"
    return {
        "rl.samples_per_prompt": Counterpart({f"{ROLLOUT}.n": rl.samples_per_prompt}),
        "rl.temperature": Counterpart(
            {
                f"{ROLLOUT}.temperature": rl.temperature,
                f"{ROLLOUT}.val_kwargs.temperature": rl.temperature,
            }
        ),
        "rl.length_schedule": Counterpart(
            {
                "data.max_response_length": phase.max_new_tokens,
                f"{ROLLOUT}.max_model_len": longest,
                f"{ACTOR}.ppo_max_token_len_per_gpu": max(MIN_TOKENS_PER_GPU, longest),
            },
            "one configuration a phase",
        ),
        "rl.dynamic_sampling": Counterpart(
            {
                "algorithm.filter_groups.enable": is_filtered,
                "algorithm.filter_groups.metric": "acc" if is_filtered else None,
                "algorithm.filter_groups.max_inflight_gen_batches": 1,
            }
        ),
        "rl.max_refills": Counterpart(
            remark="none: verl goes on until the batch is full" if is_filtered else "nothing is refilled"
        ),
        "rl.rollout.engine": Counterpart({f"{ROLLOUT}.name": "vllm"}, "vLLM in any case"),
        "rl.rollout.gpu_memory_utilization": Counterpart(
            {f"{ROLLOUT}.gpu_memory_utilization": rl.rollout.gpu_memory_utilization}
            if rl.rollout.engine == "vllm"
            else {},
            "" if rl.rollout.engine == "vllm" else "verl's own default",
        ),
        "rl.rollout.max_rows": Counterpart(remark="vLLM bounds its own batch"),
        "rl.precision": Counterpart(remark="verl computes in bfloat16"),
        "rl.engine": Counterpart(
            remark="how the policy lies on the devices is said to verl on its command line"
        ),
        "rl.micro_batch_rows": Counterpart(
            {f"{ACTOR}.use_dynamic_bsz": True}, "tokens of a forward pass, not rows; memory only"
        ),
    }


def _loss(rl: RLConfig, phase: LengthPhase) -> dict[str, Counterpart]:
    correction = "algorithm.rollout_correction"
    is_weighted = rl.importance_cap is not None
    return {
        "rl.old_log_probs": Counterpart({f"{correction}.bypass_mode": rl.old_log_probs == "sampler"}),
        "rl.importance_cap": Counterpart(
            {
                f"{correction}.rollout_is": "token" if is_weighted else None,
                **({f"{correction}.rollout_is_threshold": rl.importance_cap} if is_weighted else {}),
            }
        ),
        "rl.clip_low": Counterpart(
            {f"{ACTOR}.clip_ratio_low": rl.clip_low, f"{ACTOR}.clip_ratio": rl.clip_low}
        ),
        "rl.clip_high": Counterpart({f"{ACTOR}.clip_ratio_high": rl.clip_high}),
        "rl.loss_aggregation": Counterpart(
            {
                f"{ACTOR}.loss_agg_mode": LOSS_AGGREGATIONS[rl.loss_aggregation],
                f"{ACTOR}.loss_scale_factor": phase.max_new_tokens
                if rl.loss_aggregation == "dr_grpo"
                else None,
            }
        ),
        "rl.scale_rewards": Counterpart({"algorithm.norm_adv_by_std_in_grpo": rl.scale_rewards == "group"}),
        "rl.entropy_bonus": Counterpart(
            {f"{ACTOR}.entropy_coeff": rl.entropy_bonus},
            "verl averages entropy as it averages the loss, ours over tokens"
            if rl.entropy_bonus and rl.loss_aggregation != "dapo"
            else "",
        ),
    }


def _optimizer(rl: RLConfig) -> dict[str, Counterpart]:
    optim = f"{ACTOR}.optim"
    return {
        "rl.learning_rate": Counterpart({f"{optim}.lr": rl.learning_rate}),
        "rl.warmup_steps": Counterpart(
            {f"{optim}.lr_warmup_steps": rl.warmup_steps},
            "verl starts from rate 0, one step behind ours" if rl.warmup_steps else "",
        ),
        "rl.optimizer.beta1": Counterpart({f"{optim}.betas": [rl.optimizer.beta1, rl.optimizer.beta2]}),
        "rl.optimizer.beta2": Counterpart({f"{optim}.betas": [rl.optimizer.beta1, rl.optimizer.beta2]}),
        "rl.optimizer.epsilon": Counterpart(
            {f"{optim}.override_optimizer_config": {"eps": rl.optimizer.epsilon}}
        ),
        "rl.optimizer.weight_decay": Counterpart(
            {f"{optim}.weight_decay": rl.optimizer.weight_decay},
            "verl decays norms too, ours matrices only" if rl.optimizer.weight_decay else "",
        ),
        "rl.optimizer.max_gradient_norm": Counterpart({f"{optim}.clip_grad": rl.optimizer.max_gradient_norm}),
    }


def _bookkeeping(rl: RLConfig, phase: LengthPhase, prompts: Prompts) -> dict[str, Counterpart]:
    steps_per_epoch = prompts.num_training // rl.prompts_per_step or 1
    return {
        "rl.num_steps": Counterpart(
            {
                "trainer.total_training_steps": phase.until_step,
                # verl also stops after so many passes, which it counts without the prompts that refills take
                "trainer.total_epochs": -(-rl.num_steps // steps_per_epoch),
            },
            "the phase's last step",
        ),
        "rl.log_every": Counterpart(remark="verl logs every step"),
        "rl.eval_every": Counterpart(
            {
                "trainer.test_freq": rl.eval_every or -1,
                "trainer.val_before_train": rl.eval_every > 0,
            },
            "accuracy on `validation.parquet`, one sample a problem",
        ),
        "rl.save_every": Counterpart({"trainer.save_freq": rl.save_every}),
    }


def verl_options(
    config: RLRunConfig, phase: LengthPhase, prompts: Prompts, *, experiment: str
) -> dict[str, Any]:
    """All options that are written for one phase, by dotted name."""
    options = {**FIXED, "trainer.experiment_name": experiment}
    for counterpart in counterparts(config, phase, prompts).values():
        options |= counterpart.options
    return options


def nest(options: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as nested tables.

    >>> nest({"data.seed": 0, "data.shuffle": True, "x": 1})
    {'data': {'seed': 0, 'shuffle': True}, 'x': 1}
    """
    tree: dict[str, Any] = {}
    for name, value in options.items():
        *sections, last = name.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
    return tree
