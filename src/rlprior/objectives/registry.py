"""What each objective is made of, by the name that configuration files use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlprior.objectives import formulas, reference
from rlprior.objectives.closed_form import RowEvaluator
from rlprior.objectives.formulas import Needs, RowStatistics, RowTerms
from rlprior.objectives.reference import Distribution
from rlprior.objectives.settings import (
    CrossEntropy,
    DynamicFineTuning,
    Focal,
    LabelSmoothing,
    Objective,
    RewardShaping,
    SampledReward,
)

S = TypeVar("S", bound=Objective)


@dataclass(frozen=True)
class Entry:
    """One objective.

    Attributes:
        settings: its settings class.
        needs: statistics that its closed form asks for.
        terms: its closed form, from a row's statistics to loss and gradient.
        reference: the same loss for autograd.
    """

    settings: type[Objective]
    needs: Callable[[Any], Needs]
    terms: Callable[[Any, RowStatistics], RowTerms]
    reference: Callable[[Any, Distribution], Tensor]


def _entry(
    settings: type[S],
    needs: Callable[[S], Needs],
    terms: Callable[[S, RowStatistics], RowTerms],
    reference: Callable[[S, Distribution], Tensor],
) -> Entry:
    """An entry whose functions are checked to take its settings."""
    return Entry(settings, needs, terms, reference)


_ENTRIES = (
    _entry(CrossEntropy, formulas.cross_entropy_needs, formulas.cross_entropy_terms, reference.cross_entropy),
    _entry(
        RewardShaping, formulas.reward_shaping_needs, formulas.reward_shaping_terms, reference.reward_shaping
    ),
    _entry(
        LabelSmoothing,
        formulas.label_smoothing_needs,
        formulas.label_smoothing_terms,
        reference.label_smoothing,
    ),
    _entry(Focal, formulas.focal_needs, formulas.focal_terms, reference.focal),
    _entry(
        DynamicFineTuning,
        formulas.dynamic_fine_tuning_needs,
        formulas.dynamic_fine_tuning_terms,
        reference.dynamic_fine_tuning,
    ),
    _entry(
        SampledReward, formulas.sampled_reward_needs, formulas.sampled_reward_terms, reference.sampled_reward
    ),
)

REGISTRY: dict[str, Entry] = {entry.settings.name: entry for entry in _ENTRIES}
"""Every objective by name."""

OBJECTIVES: dict[str, type[Objective]] = {name: entry.settings for name, entry in REGISTRY.items()}
"""Settings class of every objective by name, for configuration files."""

IMPLEMENTATIONS: tuple[str, ...] = ("chunked", "triton", "reference")
"""Ways to compute a loss from hidden states and weight; each takes every objective, "triton" all but those that draw."""


def find_kernels(
    implementation: str, objective: Objective, compute_dtype: torch.dtype, device: torch.device
) -> RowEvaluator | None:
    """The Triton kernels where "triton" is asked for, else None.

    Raises:
        ValueError: something that they need is missing.
    """
    if implementation != "triton":
        return None
    try:
        from rlprior.objectives import fused
    except ImportError:
        unmet = "the triton package (pip install 'rlprior[gpu]')"
    else:
        if find_entry(objective).needs(objective).num_draws:
            unmet = f"an objective that draws no tokens, got {type(objective).__name__}"
        elif compute_dtype not in fused.DTYPES:
            unmet = f"logits in float32, bfloat16 or float16, got {compute_dtype}"
        elif device.type != "cuda" and not fused.IS_INTERPRETED:
            unmet = f"tensors on a CUDA device, got {device.type}"
        else:
            return fused.evaluate_rows_
    raise ValueError(f"implementation 'triton' needs {unmet}; 'auto' takes what fits")


def find_entry(objective: Objective) -> Entry:
    """Entry of these settings.

    Raises:
        ValueError: not the settings of a registered objective.
    """
    entry = REGISTRY.get(getattr(objective, "name", ""))
    if entry is None or not isinstance(objective, entry.settings):
        known = ", ".join(entry.settings.__name__ for entry in REGISTRY.values())
        raise ValueError(f"shaping must be an instance of one of {known}; got {objective!r}")
    return entry
