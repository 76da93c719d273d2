"""What is measured of a checkpoint, and how much of it on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlprior.sampling.sampler import Decoding
from rlprior.tasks.config import TaskConfig


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is measured at one checkpoint.

    Args:
        held_out_tokens: held-out text, whole documents until so many tokens are reached.
        num_problems: problems of each task.
        samples_per_problem: size m of the pool behind Avg@m, Cons@m and Pass@k (128 in the paper).
    """

    held_out_tokens: int = 1_000_000
    num_problems: int = 1000
    samples_per_problem: int = 128

    def __post_init__(self) -> None:
        for name in ("held_out_tokens", "num_problems", "samples_per_problem"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out likelihood and one pool of samples a task.

    Args:
        held_out_sources: sources of the corpus whose held-out documents make up the one likelihood set.
        tasks: problems to answer, by the name that the report shows.
        decoding: temperature 0.7 and top-p 0.95 for base models, as in the papers; the report states them.
        final: budget of a stage's last checkpoint.
        intermediate: budget of those before it (the curves).
        top_k: head size of the head-mass metric.
    """

    held_out_sources: tuple[str, ...]
    tasks: dict[str, TaskConfig]
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.7, top_p=0.95))
    final: Budget = field(default_factory=Budget)
    intermediate: Budget = field(default_factory=Budget)
    top_k: int = 100

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
