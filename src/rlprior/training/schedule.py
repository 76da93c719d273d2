"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warmup, stable, decay. Defaults are the paper's pre-training (appendix A.1).

    Args:
        peak_learning_rate: rate of the stable part.
        final_learning_rate: rate that the last step's decay arrives at.
        warmup_steps: linear from 0; the first step already moves.
        decay_steps: how many of the last steps decay; 0 keeps the rate constant.
        decay: form of the decay (linear; cosine is ReMiT's).
    """

    peak_learning_rate: float = 3e-4
    final_learning_rate: float = 3e-5
    warmup_steps: int = 2000
    decay_steps: int = 0
    decay: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if not 0 < self.peak_learning_rate < math.inf:
            raise ValueError(f"peak_learning_rate must be above 0, not {self.peak_learning_rate}")
        if not 0 <= self.final_learning_rate <= self.peak_learning_rate:
            raise ValueError(
                f"final_learning_rate must lie between 0 and peak_learning_rate, not {self.final_learning_rate}"
            )
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")


def learning_rate(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Rate of step `step`, counted from 1 to `num_steps`.

    peak * step / warmup in the warmup; peak; then from peak to final over the last `decay_steps` steps, arriving at step `num_steps`.

    >>> wsd = ScheduleConfig(peak_learning_rate=1.0, final_learning_rate=0.0, warmup_steps=2, decay_steps=4)
    >>> [learning_rate(wsd, step, 8) for step in range(1, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    peak, final = schedule.peak_learning_rate, schedule.final_learning_rate
    warm = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    done = max(0.0, 1 - (num_steps - step) / schedule.decay_steps) if schedule.decay_steps else 0.0
    if schedule.decay == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return warm * (peak + (final - peak) * done)
