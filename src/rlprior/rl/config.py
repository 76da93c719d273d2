"""Settings of reinforcement learning with verifiable rewards. Defaults are the first paper's (appendix B.1) where it gives one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rlprior.config import HOW
from rlprior.sampling.engines import RolloutConfig
from rlprior.tasks.config import TaskConfig
from rlprior.training.engine import EngineConfig, Precision
from rlprior.training.update import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class LengthPhase:
    """Longest response until a step (included); `until_step` left out means to the end."""

    max_new_tokens: int
    until_step: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.until_step is not None and self.until_step < 1:
            raise ValueError(f"until_step must be at least 1, not {self.until_step}")


PAPER_LENGTHS = (LengthPhase(until_step=700, max_new_tokens=8192), LengthPhase(max_new_tokens=16384))


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """On-policy GRPO without KL, with clip-higher and dynamic sampling.

    Args:
        task: where the training problems come from.
        num_problems: how many different ones are drawn.
        num_steps: optimizer updates (1000 in the paper).
        prompts_per_step: groups of one update. The paper's 'batch size of 128' is read as prompts.
        samples_per_prompt: group size.
        temperature: of the rollouts.
        rollout: who draws them.
        length_schedule: longest response, by step.
        dynamic_sampling: 'refill' drops groups of equal rewards and draws new prompts in their place; 'drop' trains on fewer;
            'off' keeps them, with advantage 0 and their tokens in the loss's denominator.
        max_refills: after so many refills the step trains on the groups it has (none: the step is skipped and counted).
        old_log_probs: 'trainer' recomputes them with the training forward, so that the ratio is 1 and clipping inactive with one
            update a rollout; 'sampler' takes those that the tokens were drawn with. The paper does not say which it uses.
        clip_low, clip_high: of the ratio; the paper cites DAPO for clip-higher, whose values these are.
        loss_aggregation: what a token counts: 'dapo' as much as any other of the batch, 'grpo' as a part of its response, 'dr_grpo' a
            constant (`aggregation_weights`). The paper does not say; it cites DAPO.
        scale_rewards: 'group' divides advantages by the group's standard deviation, 'none' does not.
        signal: 'positive' trains on advantages above 0 alone, 'negative' on those below (Zhu et al. 2025, 'The surprising effectiveness
            of negative reinforcement'; differs: there rewards are +1 and -1, without a baseline).
        mask_truncated: responses cut by the length limit carry no gradient (DAPO, section 3.4, overlong filtering).
        entropy_bonus: coefficient of the mean token entropy, subtracted from the loss.
        importance_cap: weigh each token by min(trainer's probability / sampler's, cap), for a sampler that is not the trainer's
            arithmetic; left out, no weight.
        learning_rate, warmup_steps: linear warmup, then constant.
        optimizer: AdamW; no weight decay by default.
        micro_batch_rows: responses of one forward pass; memory and rounding only.
        precision: dtype of the matrix products of an update: 'auto' is bfloat16 on GPUs and float32 on CPUs.
        engine: how the policy lies on the devices.
        log_every, eval_every, save_every: as in training.
    """

    task: TaskConfig
    num_problems: int = 4096
    num_steps: int = 1000
    prompts_per_step: int = 128
    samples_per_prompt: int = 16
    temperature: float = 1.0
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    length_schedule: tuple[LengthPhase, ...] = PAPER_LENGTHS
    dynamic_sampling: Literal["refill", "drop", "off"] = "refill"
    max_refills: int = 4
    old_log_probs: Literal["trainer", "sampler"] = "trainer"
    clip_low: float = 0.2
    clip_high: float = 0.28
    loss_aggregation: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    scale_rewards: Literal["group", "none"] = "group"
    signal: Literal["both", "positive", "negative"] = "both"
    mask_truncated: bool = False
    entropy_bonus: float = 0.0
    importance_cap: float | None = None
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(weight_decay=0.0))
    micro_batch_rows: int = field(default=64, metadata=HOW)
    precision: Precision = "auto"
    engine: EngineConfig = field(default_factory=EngineConfig, metadata=HOW)
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        names = (
            "num_problems",
            "num_steps",
            "prompts_per_step",
            "micro_batch_rows",
            "log_every",
            "save_every",
        )
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.samples_per_prompt < 2:
            raise ValueError(
                "samples_per_prompt must be at least 2: advantages compare the samples of one prompt"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if min(self.max_refills, self.warmup_steps, self.eval_every) < 0:
            raise ValueError("max_refills, warmup_steps and eval_every must be 0 or more")
        if not 0 < self.clip_low <= 1 or not self.clip_high > 0:
            raise ValueError("clip_low must lie in (0, 1] and clip_high above 0")
        if not 0 <= self.entropy_bonus < math.inf:
            raise ValueError(f"entropy_bonus must be 0 or more and finite, not {self.entropy_bonus}")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap must be above 0, not {self.importance_cap}")
        if self.importance_cap is not None and self.old_log_probs == "sampler":
            raise ValueError(
                "importance_cap is for old_log_probs = 'trainer': with 'sampler' the ratio corrects already"
            )
        if self.rollout.engine == "vllm" and self.importance_cap is None and self.old_log_probs == "trainer":
            raise ValueError(
                "rollout.engine = 'vllm' draws with other probabilities than the trainer's; write importance_cap = 2.0 "
                "(inf for no cap), or old_log_probs = 'sampler'"
            )
        if self.engine.compile:
            raise ValueError(
                "engine.compile is not for reinforcement learning: the shapes change with each step and response"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        ends = [phase.until_step for phase in self.length_schedule]
        if (
            not ends
            or ends[-1] is not None
            or None in ends[:-1]
            or ends[:-1] != sorted(set(ends[:-1]), key=lambda e: e or 0)
        ):
            raise ValueError("length_schedule needs rising until_step, and a last phase without one")

    def max_new_tokens(self, step: int) -> int:
        """Longest response of step `step`."""
        phases = self.length_schedule
        return next(p.max_new_tokens for p in phases if p.until_step is None or step <= p.until_step)

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of `step` is kept and evaluated."""
        return step == self.num_steps or (self.eval_every > 0 and step % self.eval_every == 0)
