"""torchtitan: a loss for its configuration, alone or inside its `ChunkedLossWrapper`.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from rlprior.integrations.next_token import IGNORE_INDEX, start_draws
from rlprior.objectives import Objective, shaped_cross_entropy


def shaped_loss_config(shaping: Objective, *, z_loss: float = 0.0) -> Any:
    """Configuration of the shaped loss, where torchtitan takes a `BaseLoss.Config`.

    The loss takes `(pred [..., V], labels [...], global_valid_tokens=None)` and returns the sum over the labels that are not
    -100, divided by `global_valid_tokens`, and no metrics. `ChunkedLossWrapper.Config(loss_fn=...)` calls it on a part
    of the positions at a time, so that the logits of all of them never exist. It runs as it is where torchtitan
    compiles its losses.

    Args:
        shaping: settings of any objective.
        z_loss: as in `shaped_cross_entropy`.

    Raises:
        ImportError: torchtitan is not installed.
        ValueError: not the settings of an objective.
    """
    start_draws(shaping)  # refuses what is no objective
    return _loss_class().Config(shaping=shaping, z_loss=z_loss)


@functools.cache
def _loss_class() -> Any:
    """The loss class; made late, because its base class is torchtitan's."""
    try:
        base: Any = importlib.import_module("torchtitan.components.loss").BaseLoss
    except ModuleNotFoundError as error:
        if error.name != "torchtitan":
            raise
        raise ImportError(
            "this loss is for torchtitan, which is not installed: pip install torchtitan"
        ) from None

    class ShapedLoss(base):
        """Shaped loss of logits, summed or divided by the tokens of all ranks."""

        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            shaping: Objective
            z_loss: float = 0.0

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            self.shaping: Objective = config.shaping
            self.z_loss: float = config.z_loss
            self.draws = start_draws(config.shaping)
            self.fn = self.summed_loss

        def summed_loss(self, pred: Tensor, labels: Tensor) -> Tensor:
            if isinstance(pred, DTensor):
                raise ValueError(
                    "the logits are split over ranks (tensor parallelism), which this loss does not support; "
                    "leave tensor parallelism of the output layer off"
                )
            return shaped_cross_entropy(
                pred,
                labels,
                self.shaping,
                ignore_index=IGNORE_INDEX,
                reduction="sum",
                generator=self.draws,
                z_loss=self.z_loss,
            )

        def __call__(
            self,
            pred: Tensor,
            labels: Tensor,
            global_valid_tokens: Tensor | None = None,
            **_: Any,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            loss = self.fn(pred, labels)
            return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}

    return ShapedLoss
