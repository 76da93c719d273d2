"""The mathematics of the objectives, one token position at a time and without autograd.

Every tensor holds one number per position, shape [N], unless its name ends in a shape suffix:
N flattened positions, V vocabulary, S draws.

Notation of the papers, used in this file only: `p_x` is the probability of the target x and `q = 1 - p_x`; `K` is the set
of the k most probable tokens; `lambda-tilde` is the reward of wrong tokens in K and `lambda-hat` that of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlprior.objectives.settings import (
    CrossEntropy,
    DynamicFineTuning,
    Focal,
    LabelSmoothing,
    RewardShaping,
    SampledReward,
)


@dataclass(frozen=True)
class Draws:
    """Tokens drawn from the model at each position, all [N, S]."""

    log_prob: Tensor
    is_target: Tensor
    is_head: Tensor


@dataclass(frozen=True)
class RowStatistics:
    """What the closed forms need to know about each position.

    `log_normalizer` is log sum_j exp(z_j), so that log p_j = z_j - log_normalizer.
    `head` is K without x and `tail` everything else but x; where no head was selected, all wrong tokens are counted as
    head. `*_mass` is a sum of p and `*_nats` a sum of -p log p. `mean_log_prob` runs over the `num_finite` tokens whose
    logit is not -inf. Statistics that the objective did not ask for in its `Needs` are None.
    """

    log_prob: Tensor
    prob: Tensor
    other_prob: Tensor
    log_normalizer: Tensor
    head_mass: Tensor
    tail_mass: Tensor
    head_nats: Tensor | None = None
    tail_nats: Tensor | None = None
    mean_log_prob: Tensor | None = None
    num_finite: Tensor | None = None
    draws: Draws | None = None


@dataclass(frozen=True)
class RowTerms:
    """Loss of each position and its gradient with respect to the logits, in the parts that it is made of.

    dL/dz_j = p_j head_scale for wrong tokens in the head, p_j tail_scale for those in the tail, and target_gradient for
    x; then `shift` is subtracted from every wrong token with a finite logit, and `draw_gradients_NS` is added at the
    drawn tokens that are not x.
    """

    loss: Tensor
    head_scale: Tensor
    tail_scale: Tensor
    target_gradient: Tensor
    shift: Tensor | None = None
    draw_gradients_NS: Tensor | None = None


@dataclass(frozen=True)
class Needs:
    """Statistics that cost a pass over the vocabulary and that an objective asks for."""

    top_k: int | None = None  # None: the gradient treats head and tail alike
    head_nats: bool = False
    tail_nats: bool = False
    mean_log_prob: bool = False
    num_draws: int = 0


def target_log_prob(shifted_logit: Tensor, target_exp: Tensor, other_exp: Tensor) -> Tensor:
    """`log p_x` with full relative precision at both ends.

    Args:
        shifted_logit: `z_x - max_j z_j`.
        target_exp: `e_x`, the exponential of `shifted_logit`.
        other_exp: sum of the exponentials of all other shifted logits, computed without x.

    >>> margin = torch.tensor([-1000.0, 20.0])  # z_x minus the only other logit, in float32
    >>> shifted, other = margin.clamp(max=0), (-margin).clamp(max=0).exp()
    >>> target_log_prob(shifted, shifted.exp(), other)
    tensor([-1.0000e+03, -2.0612e-09])
    """
    total = target_exp + other_exp
    # Near 1 the plain form rounds to 0; far from 1 the log1p form overflows (at a margin of about 90 in float32).
    return torch.where(
        target_exp > 0.5 * total, -torch.log1p(other_exp / target_exp), shifted_logit - torch.log(total)
    )


def log_complement(prob: Tensor, other_prob: Tensor) -> Tensor:
    """`log q` from `p_x` and `q`, each computed without subtracting the other from 1."""
    return torch.where(prob < 0.5, torch.log1p(-prob), torch.log(other_prob))


def positive_weight(log_prob: Tensor, log_other_prob: Tensor, beta: float) -> Tensor:
    """Weight of the correct token, `w = p_x^(1 - (1 - p_x)^beta)`: its probability times its reward.

    Args:
        log_prob: `log p_x`, at most 0.
        log_other_prob: `log(1 - p_x)`, at most 0; -inf is the limit p_x = 1.
        beta: greater than -1.

    Returns:
        w > 0. It is exactly 1 where `beta` is 0 and in the limits p_x = 0 and p_x = 1.

    Source: Diversity or Precision?, arXiv:2512.22955, eq. 11 and section 4.1.

    >>> log_p = torch.tensor([0.5]).log()
    >>> positive_weight(log_p, log_p, beta=-0.25)  # 0.5 ** (1 - 0.5 ** -0.25)
    tensor([1.1401])
    """
    # q^beta overflows only where q is below the smallest normal number: w is then anything between 1 and its value, which is
    # below e, and the loss and the gradient that it multiplies have lost their precision already.
    excess = torch.expm1(beta * log_other_prob).clamp(max=torch.finfo(log_prob.dtype).max)
    weight = torch.exp(-excess * log_prob)
    inside = torch.isfinite(log_other_prob) & (log_other_prob < 0)
    return torch.where(inside, weight, torch.ones_like(weight))


def focal_weights(
    log_prob: Tensor, prob: Tensor, log_other_prob: Tensor, other_prob: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Modulating factor `q^gamma` and the weight of the gradient, `-dL/dlog p_x = q^gamma - gamma q^(gamma-1) p_x log p_x`.

    Source: Focal Loss for Dense Object Detection, arXiv:1708.02002, eq. 4 and appendix B.
    """
    if gamma == 0:
        return torch.ones_like(prob), torch.ones_like(prob)
    factor = torch.exp(gamma * log_other_prob)
    # -log p / q tends to 1 as p tends to 1, where both underflow; p log p tends to 0 as p tends to 0.
    surprisal = torch.where(prob > 0, -log_prob, torch.zeros_like(prob))
    ratio = torch.where(other_prob > 0, surprisal / other_prob, torch.ones_like(prob))
    return factor, factor * (1 + gamma * prob * ratio)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """`c tanh(z / c)` of logits of any shape; -inf stays -inf."""
    return (softcap * torch.tanh(logits / softcap)).masked_fill(logits == -torch.inf, -torch.inf)


def draw_tokens(masses_NV: Tensor, uniforms_NS: Tensor) -> Tensor:
    """Tokens [N, S] by inversion of the cumulative distribution, so that one uniform number decides one draw.

    Args:
        masses_NV: non-negative, proportional to the probabilities.
        uniforms_NS: float64 in [0, 1).

    >>> draw_tokens(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.0, 0.24, 0.26]], dtype=torch.float64))
    tensor([[1, 1, 2]])
    """
    cumulative_NV = masses_NV.to(torch.float64).cumsum(1)
    # Below the total even after rounding, as 1 - 2^-53 is the largest number: no token past the last one with any mass.
    levels_NS = uniforms_NS * cumulative_NV[:, -1:]
    drawn_NS = torch.searchsorted(cumulative_NV, levels_NS, right=True)
    return drawn_NS.clamp(
        max=masses_NV.shape[1] - 1
    )  # a row of nan draws something: its loss is nan, not an error


def add_z_loss(terms: RowTerms, row: RowStatistics, z_loss: float) -> RowTerms:
    """The same objective plus `z_loss * Z^2` with `Z = log sum_j exp(z_j)`; adds `2 z_loss Z p_j` to each dL/dz_j.

    Source: the auxiliary loss of PaLM, arXiv:2204.02311, section 5, which takes 1e-4.
    """
    slope = 2 * z_loss * row.log_normalizer
    return replace(
        terms,
        loss=terms.loss + z_loss * row.log_normalizer.square(),
        head_scale=terms.head_scale + slope,
        tail_scale=terms.tail_scale + slope,
        target_gradient=terms.target_gradient + slope * row.prob,
    )


def cross_entropy_needs(settings: CrossEntropy) -> Needs:
    """Nothing beyond the target's probability."""
    return Needs()


def cross_entropy_terms(settings: CrossEntropy, row: RowStatistics) -> RowTerms:
    """`L = -log p_x`, `dL/dz_j = p_j - 1[j = x]`."""
    return _weighted_terms(-row.log_prob, torch.ones_like(row.prob), row)


def dynamic_fine_tuning_needs(settings: DynamicFineTuning) -> Needs:
    """Nothing beyond the target's probability."""
    return Needs()


def dynamic_fine_tuning_terms(settings: DynamicFineTuning, row: RowStatistics) -> RowTerms:
    """`L = -sg(p_x) log p_x`, `dL/dz_j = p_x (p_j - 1[j = x])`."""
    return _weighted_terms(-row.prob * _finite_log_prob(row), row.prob, row)


def focal_needs(settings: Focal) -> Needs:
    """Nothing beyond the target's probability."""
    return Needs()


def focal_terms(settings: Focal, row: RowStatistics) -> RowTerms:
    """`L = -q^gamma log p_x`, differentiated through both factors."""
    log_other_prob = log_complement(row.prob, row.other_prob)
    factor, weight = focal_weights(row.log_prob, row.prob, log_other_prob, row.other_prob, settings.gamma)
    return _weighted_terms(-factor * row.log_prob, weight, row)


def label_smoothing_needs(settings: LabelSmoothing) -> Needs:
    """The mean log-probability, unless nothing is smoothed."""
    return Needs(mean_log_prob=settings.smoothing > 0)


def label_smoothing_terms(settings: LabelSmoothing, row: RowStatistics) -> RowTerms:
    """`L = -(1 - s) log p_x - s mean_j log p_j`, `dL/dz_j = p_j - (1 - s) 1[j = x] - s / V`.

    Differs: j and V run over the tokens with a finite logit, so that a padded vocabulary does not make the loss infinite.
    """
    if row.mean_log_prob is None or row.num_finite is None:
        return _weighted_terms(-row.log_prob, torch.ones_like(row.prob), row)
    smoothing = settings.smoothing
    shift = smoothing / row.num_finite
    one = torch.ones_like(row.prob)
    return RowTerms(
        loss=-(1 - smoothing) * row.log_prob - smoothing * row.mean_log_prob,
        head_scale=one,
        tail_scale=one,
        target_gradient=smoothing - shift - row.other_prob,
        shift=shift,
    )


def reward_shaping_needs(settings: RewardShaping) -> Needs:
    """A head where its reward differs from the tail's, and the negatives' part of the loss where they have a reward."""
    return Needs(
        top_k=settings.top_k if settings.head_reward != settings.tail_reward else None,
        head_nats=settings.head_reward != 0,
        tail_nats=settings.tail_reward != 0,
    )


def reward_shaping_terms(settings: RewardShaping, row: RowStatistics) -> RowTerms:
    """Exact expectation of the policy gradient under the shaped reward.

    L = -sg(w) log p_x - sum_{a != x} r_a sg(p_a) log p_a,   r_a = lambda-tilde in K, lambda-hat outside
    dL/dz_j = p_j (C - r_j) for j != x,   dL/dz_x = p_x C - w,   C = w + sum_{a != x} r_a p_a

    Source: Diversity or Precision?, arXiv:2512.22955, eqs. 5 and 11-13.
    Differs: the expectation over tokens is exact where the paper's eq. 5 leaves the estimator open. K takes every token
    that ties with the k-th, so that it does not depend on the order of the vocabulary.
    """
    weight = positive_weight(row.log_prob, log_complement(row.prob, row.other_prob), settings.beta)
    head, tail = settings.head_reward, settings.tail_reward
    negative_reward = head * row.head_mass + tail * row.tail_mass
    loss = -weight * row.log_prob
    if row.head_nats is not None:
        loss = loss + head * row.head_nats
    if row.tail_nats is not None:
        loss = loss + tail * row.tail_nats
    # C - r and p_x C - w, each in the order and the form in which nothing cancels as p_x tends to 1, not even where a reward is w.
    target_gradient = torch.where(
        row.prob > 0.5,
        (head - weight) * row.head_mass + (tail - weight) * row.tail_mass - row.other_prob * negative_reward,
        row.prob * negative_reward - weight * row.other_prob,
    )
    return RowTerms(
        loss=loss,
        head_scale=(weight - head) + negative_reward,
        tail_scale=(weight - tail) + negative_reward,
        target_gradient=target_gradient,
    )


def sampled_reward_needs(settings: SampledReward) -> Needs:
    """The draws, and the head where it decides a reward."""
    return Needs(
        top_k=settings.top_k if settings.head_reward != settings.tail_reward else None,
        num_draws=settings.num_samples,
    )


def sampled_rewards(
    settings: SampledReward, log_prob: Tensor, log_other_prob: Tensor, draws: Draws
) -> Tensor:
    """Reward [N, S] of each draw: `(1/p_x)^((1 - p_x)^beta)` for the target, head or tail reward for the rest.

    Source: Diversity or Precision?, arXiv:2512.22955, eqs. 11-13.
    """
    weight = positive_weight(log_prob, log_other_prob, settings.beta)
    positive_N1 = torch.exp(torch.log(weight) - log_prob)[:, None]
    head = torch.full_like(draws.log_prob, settings.head_reward)
    tail = torch.full_like(draws.log_prob, settings.tail_reward)
    # `where`, not a product: the reward of a target that is never drawn may overflow.
    return torch.where(draws.is_target, positive_N1, torch.where(draws.is_head, head, tail))


def sampled_reward_terms(settings: SampledReward, row: RowStatistics) -> RowTerms:
    """`L = -mean_s sg(r(a_s)) log p(a_s)`, `dL/dz_j = mean_s r(a_s) (p_j - 1[j = a_s])`."""
    if row.draws is None:
        raise RuntimeError("the sampled estimator needs draws")
    draws = row.draws
    log_other_prob = log_complement(row.prob, row.other_prob)
    rewards_NS = sampled_rewards(settings, row.log_prob, log_other_prob, draws)
    zero_NS = torch.zeros_like(rewards_NS)
    target_reward = torch.where(draws.is_target, rewards_NS, zero_NS).mean(1)
    other_NS = torch.where(draws.is_target, zero_NS, rewards_NS)
    other_reward = other_NS.mean(1)
    scale = target_reward + other_reward
    return RowTerms(
        loss=-(rewards_NS * torch.where(draws.is_target, row.log_prob[:, None], draws.log_prob)).mean(1),
        head_scale=scale,
        tail_scale=scale,
        target_gradient=row.prob * other_reward - row.other_prob * target_reward,
        draw_gradients_NS=-other_NS / other_NS.shape[1],
    )


def _weighted_terms(loss: Tensor, weight: Tensor, row: RowStatistics) -> RowTerms:
    return RowTerms(loss=loss, head_scale=weight, tail_scale=weight, target_gradient=-weight * row.other_prob)


def _finite_log_prob(row: RowStatistics) -> Tensor:
    # p log p is 0 where p is 0, also for a logit of -inf.
    return torch.where(row.prob > 0, row.log_prob, torch.zeros_like(row.prob))
