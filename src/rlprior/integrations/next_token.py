"""What every integration of a next-token loss does the same way: shift, normalise, draw.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlprior.objectives import Objective, SampledReward
from rlprior.objectives.registry import find_entry

IGNORE_INDEX = -100
"""Label of positions that count for nothing, in every trainer that has an integration here."""


def shift_left(labels_BT: Tensor, fill: float) -> Tensor:
    """What each position predicts: the label to its right, and `fill` at the last one."""
    return pad(labels_BT[..., 1:], (0, 1), value=fill)


def divide_by_count(loss: Tensor, count: Tensor | int) -> Tensor:
    """Summed loss over the number of targets of the whole batch, wherever that number lies."""
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def start_draws(shaping: Objective) -> torch.Generator | None:
    """One stream for all the draws of a training run, from the seed of `shaping`; None for objectives that draw nothing.

    Raises:
        ValueError: not the settings of an objective.
    """
    find_entry(shaping)
    return torch.Generator().manual_seed(shaping.seed) if isinstance(shaping, SampledReward) else None
