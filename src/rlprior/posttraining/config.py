"""Settings of supervised fine-tuning and of direct preference optimization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlprior.objectives import CrossEntropy, Objective, SampledReward
from rlprior.sampling.sampler import Decoding
from rlprior.tasks.config import TaskConfig
from rlprior.training.schedule import ScheduleConfig
from rlprior.training.update import OptimizerConfig

LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
"""Losses of TRL that are a sum over pairs: those that compare pairs of a batch with each other depend on the micro-batches."""


@dataclass(frozen=True, kw_only=True)
class UpdatesConfig:
    """What both stages say of their updates.

    Args:
        num_epochs: passes over the examples; the last update is filled up from a further pass.
        num_steps: updates, in place of `num_epochs`.
        batch_size: examples (pairs) of one update.
        micro_batch_size: examples (pairs) of one forward pass, a divisor of `batch_size`; left out, all.
        learning_rate: after a linear warmup.
        warmup_steps: updates of the warmup.
        decay: constant after the warmup, or to 0 after the last update.
        optimizer: AdamW; no weight decay by default.
        precision: dtype of the matrix products; weights and moments stay float32.
        log_every, eval_every, save_every: as in training.
    """

    num_epochs: int = 1
    num_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float = 2e-5
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "linear"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(weight_decay=0.0))
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_steps", "batch_size", "micro_batch_size", "log_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.batch_size % self.rows_per_pass:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} must divide batch_size = {self.batch_size}"
            )
        if min(self.warmup_steps, self.eval_every) < 0:
            raise ValueError("warmup_steps and eval_every must be 0 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")

    @property
    def rows_per_pass(self) -> int:
        """Examples of one forward pass."""
        return self.micro_batch_size or self.batch_size

    def count_steps(self, num_examples: int) -> int:
        """Updates of the whole stage.

        >>> UpdatesConfig(num_epochs=2, batch_size=4).count_steps(9)
        5
        """
        return self.num_steps or -(-self.num_epochs * num_examples // self.batch_size)

    def schedule(self, num_steps: int) -> ScheduleConfig:
        """Learning rate by step, of `num_steps + 1` steps: the rate 0 at the end of a decay would be an update that does nothing."""
        is_constant = self.decay == "constant"
        return ScheduleConfig(
            peak_learning_rate=self.learning_rate,
            final_learning_rate=0.0,
            warmup_steps=self.warmup_steps,
            decay_steps=0 if is_constant else max(1, num_steps + 1 - self.warmup_steps),
            decay="cosine" if self.decay == "cosine" else "linear",
        )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(UpdatesConfig):
    """Supervised fine-tuning: the loss of each completion after its prompt.

    Args:
        task: problems whose worked solutions are the completions; or
        path: JSON Lines file with `prompt` and `completion`, relative to the data directory.
        num_problems: of the task; needed where they are generated.
        max_tokens: longest example, prompt included; longer ones are left out and counted. None: no limit.
        objective: the next-token objective of the completions.
    """

    task: TaskConfig | None = None
    path: str | None = None
    num_problems: int | None = None
    max_tokens: int | None = None
    objective: Objective = field(default_factory=CrossEntropy)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.task is None) == (self.path is None):
            raise ValueError("needs one of task (worked solutions) and path (a file of pairs), and not both")
        if self.path is not None and self.num_problems is not None:
            raise ValueError("num_problems is for a task; leave it out or leave path out")
        if isinstance(self.objective, SampledReward):
            raise ValueError(
                "objective sampled_reward draws numbers that a resumed run would not repeat; take another"
            )


@dataclass(frozen=True, kw_only=True)
class DPOConfig(UpdatesConfig):
    """Direct preference optimization on correct against wrong answers. Defaults of `beta`, `batch_size` and the learning rate with
    its warmup are the paper's (appendix B).

    Source: Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, eq. 7.
    Differs: the paper's optimizer is RMSprop; this is AdamW.

    Args:
        task: the problems.
        num_problems: how many; needed where they are generated.
        split, task_seed: of generated problems; evaluations ask those of the side 'test' under seed 0.
        samples_per_problem: answers drawn of each problem, where no store of samples is given.
        decoding: how they are drawn.
        rejected: verdicts that make an answer the rejected one of a pair; the chosen one is always correct.
        max_pairs_per_prompt: at most that many of the correct x wrong pairs of a prompt, drawn without replacement.
        beta: strength of the pull towards the reference.
        loss_type: as TRL names it.
        label_smoothing: probability that a preference is flipped, for `robust` and `exo_pair`.
    """

    task: TaskConfig
    num_problems: int | None = None
    split: Literal["train", "test"] = "train"
    task_seed: int = 0
    samples_per_problem: int = 16
    decoding: Decoding = field(default_factory=Decoding)
    rejected: tuple[Literal["wrong", "unparsable", "truncated"], ...] = ("wrong",)
    max_pairs_per_prompt: int = 4
    beta: float = 0.1
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    batch_size: int = 64
    learning_rate: float = 1e-6
    warmup_steps: int = 150
    decay: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples_per_problem < 2:
            raise ValueError(
                "samples_per_problem must be at least 2: a pair takes two answers to one problem"
            )
        if self.max_pairs_per_prompt < 1:
            raise ValueError(f"max_pairs_per_prompt must be at least 1, not {self.max_pairs_per_prompt}")
        if not self.rejected:
            raise ValueError('rejected needs at least one verdict, as in ["wrong"]')
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}")
        takes_smoothing = self.loss_type in ("robust", "exo_pair")
        if self.label_smoothing and not takes_smoothing:
            raise ValueError("label_smoothing is for the loss types robust and exo_pair; leave it out")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0, as in 1e-3")
