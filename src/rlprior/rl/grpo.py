"""Group-relative policy optimisation: advantages, the clipped loss, and which groups carry a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# P prompts (groups), G samples a group, N response tokens of the whole batch

STD_EPSILON = 1e-4


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """A = (r - mean(r)) / (std(r) + 1e-4) within each group.

    Args:
        rewards_PG: reward of each sample [P, G], G >= 2.

    Returns:
        advantages [P, G]; all 0 in a group of equal rewards.

    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2.
    Differs: the source does not say which standard deviation; the sample's (divisor G - 1), and 1e-4 against division by 0, are what
    TRL does.

    >>> [round(advantage, 3) for advantage in group_advantages(torch.tensor([[1.0, 0.0]]))[0].tolist()]
    [0.707, -0.707]
    """
    deviation_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    # the mean of equal numbers can be off by a rounding error, which the small divisor would blow up
    deviation_PG = deviation_PG.masked_fill(~has_signal(rewards_PG)[:, None], 0.0)
    return deviation_PG / (rewards_PG.std(1, keepdim=True) + STD_EPSILON)


def has_signal(rewards_PG: Tensor) -> Tensor:
    """Whether a group's rewards differ, so that its advantages are not all 0 [P]. Source: Yu et al. 2025 (DAPO), eq. 11."""
    return (rewards_PG != rewards_PG[:, :1]).any(1)


@dataclass(frozen=True)
class PolicyLoss:
    """The loss summed over tokens, and what is logged beside it."""

    loss_sum: Tensor
    num_clipped: int
    max_ratio_deviation: float


def clipped_policy_loss(
    log_probs_N: Tensor,
    old_log_probs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """- sum_i min(rho_i A_i, clip(rho_i, 1 - clip_low, 1 + clip_high) A_i), rho = exp(log_prob - old_log_prob).

    The token-mean loss is this divided by the number of response tokens of the whole batch, which only the caller knows.

    Args:
        log_probs_N: of the response tokens under the policy that is trained [N].
        old_log_probs_N: under the policy that drew them [N]; no gradient flows through it.
        advantages_N: of the sample that each token belongs to [N].
        clip_low, clip_high: 0.2 and 0.28 in DAPO ('clip-higher').

    Source: Yu et al. 2025 (DAPO), eq. 8.
    """
    ratio_N = torch.exp(log_probs_N - old_log_probs_N.detach())
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    plain_N, limited_N = ratio_N * advantages_N, clipped_N * advantages_N
    detached_N = ratio_N.detach()
    return PolicyLoss(
        loss_sum=-torch.minimum(plain_N, limited_N).sum(),
        num_clipped=int((limited_N < plain_N).sum()),
        max_ratio_deviation=float((detached_N - 1).abs().max()) if len(detached_N) else 0.0,
    )
