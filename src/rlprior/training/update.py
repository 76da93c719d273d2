"""One optimizer update: what pre-training, mid-training and reinforcement learning share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from rlprior.config import RunError

MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. Decay and clipping are the paper's (appendix A.1); it does not state the betas: 0.9 and 0.95 are common usage.

    Args:
        beta1, beta2: decay rates of the moments, in [0, 1).
        epsilon: added to the root of the second moment.
        weight_decay: on matrices only; norms and other vectors are not decayed.
        max_gradient_norm: the gradient is scaled down to this 2-norm.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be 0 or more and finite, not {self.weight_decay}")
        if not (self.max_gradient_norm > 0 and self.epsilon > 0):
            raise ValueError("max_gradient_norm and epsilon must be above 0")


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; its rate is set anew before each update."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


class Updater:
    """Clip, check and apply accumulated gradients.

    A step whose loss or gradient is not finite is skipped and counted; the third in a row ends the run.
    """

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig) -> None:
        self.model = model
        self.config = config
        self.optimizer = build_optimizer(model, config)
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0

    @property
    def counters(self) -> dict[str, int]:
        """What a checkpoint has to keep beside the optimizer's moments."""
        return {"num_skipped": self.num_skipped, "num_skipped_in_a_row": self.num_skipped_in_a_row}

    def restore_counters(self, state: Mapping[str, int]) -> None:
        """Go on counting from a checkpoint's `counters`."""
        self.num_skipped = state["num_skipped"]
        self.num_skipped_in_a_row = state["num_skipped_in_a_row"]

    def apply(self, loss: float, learning_rate: float, *, step: int) -> float:
        """One update from the gradients in place, which are then dropped.

        Args:
            loss: value of the step's loss, to be checked.
            learning_rate: of this step.
            step: for the error message.

        Returns:
            2-norm of the gradient before clipping.

        Raises:
            RunError: the third non-finite step in a row.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)
        gradient_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.num_skipped_in_a_row = 0
        else:
            self.num_skipped += 1
            self.num_skipped_in_a_row += 1
            if self.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise RunError(
                    f"step {step}: loss or gradient not finite {MAX_SKIPPED_IN_A_ROW} times in a row "
                    f"(loss {loss}, gradient norm {gradient_norm}); lower the learning rate"
                )
        self.optimizer.zero_grad(set_to_none=True)
        return gradient_norm
