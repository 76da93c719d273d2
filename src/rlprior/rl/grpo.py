"""Group-relative policy optimisation: advantages, the clipped loss, how tokens are weighed, and which groups carry a gradient.

P prompts (groups), G samples a group, R samples of the whole batch, N response tokens of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STD_EPSILON = 1e-4


def group_advantages(rewards_PG: Tensor, scale: Literal["group", "none"] = "group") -> Tensor:
    """A = (r - mean(r)) / (std(r) + 1e-4) within each group, or with `scale` 'none' A = r - mean(r).

    Args:
        rewards_PG: reward of each sample [P, G], G >= 2.
        scale: 'group' divides by the group's standard deviation.

    Returns:
        advantages [P, G]; all 0 in a group of equal rewards.

    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2; without the division, Liu et al. 2025 (Dr. GRPO), section 3.
    Differs: the source does not say which standard deviation; the sample's (divisor G - 1), and 1e-4 against division by 0, are what
    TRL does.

    >>> [round(advantage, 3) for advantage in group_advantages(torch.tensor([[1.0, 0.0]]))[0].tolist()]
    [0.707, -0.707]
    """
    deviation_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    # the mean of equal numbers can be off by a rounding error, which the small divisor would blow up
    deviation_PG = deviation_PG.masked_fill(~has_signal(rewards_PG)[:, None], 0.0)
    if scale == "none":
        return deviation_PG
    return deviation_PG / (rewards_PG.std(1, keepdim=True) + STD_EPSILON)


def has_signal(rewards_PG: Tensor) -> Tensor:
    """Whether a group's rewards differ, so that its advantages are not all 0 [P].

    Source: Yu et al. 2025 (DAPO), eq. 11.
    Differs: DAPO asks for a correct response and one that is not; the same for rewards of 0 and 1. With other rewards a group of wrong
    responses that are paid differently is kept.
    """
    return (rewards_PG != rewards_PG[:, :1]).any(1)


def aggregation_weights(
    num_tokens_R: Tensor, aggregation: Literal["dapo", "grpo", "dr_grpo"], max_new_tokens: int
) -> Tensor:
    """What each token of a sample counts, so that the loss is a weighted sum over tokens.

    dapo: 1 / sum_r n_r, the mean over the batch's tokens; grpo: 1 / (R n_r), the mean over samples of their means; dr_grpo:
    1 / (R max_new_tokens), a constant.

    Args:
        num_tokens_R: response tokens of each sample that count [R]; 0 for a sample that is masked.
        aggregation: by its name in TRL.
        max_new_tokens: longest response allowed.

    Returns:
        weights [R], float64.

    Source: Yu et al. 2025 (DAPO), eq. 8; Shao et al. 2024, eq. 3; Liu et al. 2025 (Dr. GRPO), section 3.2, with TRL's constant.

    >>> aggregation_weights(torch.tensor([3, 1]), "grpo", 4).tolist()
    [0.16666666666666666, 0.5]
    """
    num_tokens_R = num_tokens_R.double()
    if aggregation == "dapo":
        return 1 / num_tokens_R.sum().clamp_min(1).expand_as(num_tokens_R)
    if aggregation == "grpo":
        return 1 / (len(num_tokens_R) * num_tokens_R.clamp_min(1))
    return torch.full_like(num_tokens_R, 1 / (len(num_tokens_R) * max_new_tokens))


@dataclass(frozen=True)
class PolicyLoss:
    """The loss, a weighted sum over tokens, and what is logged beside it."""

    loss: Tensor
    num_clipped: int
    max_ratio_deviation: float


def clipped_policy_loss(
    log_probs_N: Tensor,
    old_log_probs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """- sum_i w_i min(rho_i A_i, clip(rho_i, 1 - clip_low, 1 + clip_high) A_i), rho = exp(log_prob - old_log_prob).

    Args:
        log_probs_N: of the response tokens under the policy that is trained [N].
        old_log_probs_N: under the policy that drew them [N]; no gradient flows through it.
        advantages_N: of the sample that each token belongs to [N].
        weights_N: what each token counts (`aggregation_weights`, times an importance weight if any) [N].
        clip_low, clip_high: 0.2 and 0.28 in DAPO ('clip-higher').

    Source: Yu et al. 2025 (DAPO), eq. 8.
    """
    # e^80 is as good as infinity, and its product with an advantage of 0 is 0
    ratio_N = torch.exp((log_probs_N - old_log_probs_N.detach()).clamp_max(80))
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    plain_N, limited_N = ratio_N * advantages_N, clipped_N * advantages_N
    detached_N = ratio_N.detach()
    return PolicyLoss(
        loss=-(weights_N * torch.minimum(plain_N, limited_N)).sum(),
        num_clipped=int(((limited_N < plain_N) & (weights_N > 0)).sum()),
        max_ratio_deviation=float((detached_N - 1).abs().max()) if len(detached_N) else 0.0,
    )


def truncated_importance(log_probs_N: Tensor, sampler_log_probs_N: Tensor, cap: float) -> Tensor:
    """min(exp(log_prob - sampler_log_prob), cap) [N]: corrects for a sampler whose probabilities are not the trainer's.

    Source: Yao et al. 2025, 'Your efficient RL framework secretly brings you off-policy RL training' (truncated importance sampling).
    """
    return torch.exp(log_probs_N.detach() - sampler_log_probs_N).clamp_max(cap)
