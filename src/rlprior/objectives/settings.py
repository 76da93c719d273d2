"""Settings of the objectives: frozen, validated, and made of plain numbers so that they can live in TOML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeGuard


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a plain number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_finite(field: str, value: object) -> None:
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(f"{field} must be a finite number, got {value!r}")


def _require_integer(field: str, value: object, minimum: int) -> None:
    if not is_number(value) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{field} must be an integer of at least {minimum}, got {value!r}")


def _require_shaping(beta: float, head_reward: float, tail_reward: float, top_k: int) -> None:
    _require_finite("beta", beta)
    if beta <= -1:
        raise ValueError(
            f"beta must be greater than -1, got {beta!r}: at or below -1 the weight of a correct token "
            "has no finite limit as its probability approaches 1"
        )
    _require_finite("head_reward", head_reward)
    _require_finite("tail_reward", tail_reward)
    _require_integer("top_k", top_k, minimum=1)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Plain cross-entropy, `-log p_x`: the baseline, and reward shaping with every setting at zero."""

    name: ClassVar[str] = "cross_entropy"


@dataclass(frozen=True, kw_only=True)
class RewardShaping:
    """Reward-shaped next-token objective; the defaults are cross-entropy, and the paper changes one of them at a time.

    Args:
        beta: exponent of the positive reward, greater than -1. Below 0 it sharpens, above 0 it flattens.
        head_reward: reward of wrong tokens among the `top_k` most probable.
        tail_reward: reward of all other wrong tokens.
        top_k: size of the head, at least 1; ties with the last place are in.

    Raises:
        ValueError: a value is not finite, not a number, or outside its range.

    Source: Diversity or Precision?, arXiv:2512.22955, eqs. 10-13.

    >>> RewardShaping(beta=-0.25)
    RewardShaping(beta=-0.25, head_reward=0.0, tail_reward=0.0, top_k=100)
    """

    name: ClassVar[str] = "reward_shaping"

    beta: float = 0.0
    head_reward: float = 0.0
    tail_reward: float = 0.0
    top_k: int = 100

    def __post_init__(self) -> None:
        _require_shaping(self.beta, self.head_reward, self.tail_reward, self.top_k)


@dataclass(frozen=True, kw_only=True)
class SampledReward:
    """The reward-shaped objective estimated from sampled tokens: one-step REINFORCE without a baseline.

    Args:
        beta, head_reward, tail_reward, top_k: as in `RewardShaping`.
        num_samples: tokens drawn at each position, at least 1.
        seed: seed of the draws where a call brings no generator of its own; every such call then draws
            the same, so training passes a generator.

    Raises:
        ValueError: a value is not finite, not a number, or outside its range.

    Source: Diversity or Precision?, arXiv:2512.22955, eqs. 5 and 11-13.
    """

    name: ClassVar[str] = "sampled_reward"

    beta: float = 0.0
    head_reward: float = 0.0
    tail_reward: float = 0.0
    top_k: int = 100
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _require_shaping(self.beta, self.head_reward, self.tail_reward, self.top_k)
        _require_integer("num_samples", self.num_samples, minimum=1)
        _require_integer("seed", self.seed, minimum=0)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed!r}")


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing:
    """Cross-entropy against the target mixed with a uniform distribution.

    Args:
        smoothing: share of the uniform distribution, in [0, 1).

    Raises:
        ValueError: `smoothing` is not a number or outside its range.

    Source: Rethinking the Inception Architecture for Computer Vision, arXiv:1512.00567, section 7.
    """

    name: ClassVar[str] = "label_smoothing"

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        _require_finite("smoothing", self.smoothing)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {self.smoothing!r}")


@dataclass(frozen=True, kw_only=True)
class Focal:
    """Focal loss, `-(1 - p_x)^gamma log p_x`: less weight on tokens that are already probable.

    Args:
        gamma: exponent, at least 0; 0 is cross-entropy.

    Raises:
        ValueError: `gamma` is not a number or negative.

    Source: Focal Loss for Dense Object Detection, arXiv:1708.02002, eq. 4.
    """

    name: ClassVar[str] = "focal"

    gamma: float = 2.0

    def __post_init__(self) -> None:
        _require_finite("gamma", self.gamma)
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma!r}")


@dataclass(frozen=True, kw_only=True)
class DynamicFineTuning:
    """Dynamic fine-tuning (DFT): cross-entropy weighted by the target's own probability, held constant.

    Source: On the Generalization of SFT, arXiv:2508.05629, eq. 9.
    """

    name: ClassVar[str] = "dynamic_fine_tuning"


Objective = CrossEntropy | RewardShaping | LabelSmoothing | Focal | DynamicFineTuning | SampledReward
