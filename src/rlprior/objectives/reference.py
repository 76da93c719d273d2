"""The objectives on materialised logits, differentiated by autograd through explicit stop-gradients.

Slow and memory-hungry on purpose: each loss reads like its definition, and everything else is tested against it in
float64. Shape suffixes: N flattened positions, V vocabulary, S draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rlprior.objectives.batch import TokenMetrics
from rlprior.objectives.chunked import LossRequest, refuse_double_backward
from rlprior.objectives.formulas import Draws, capped, draw_tokens, positive_weight, sampled_rewards
from rlprior.objectives.settings import (
    CrossEntropy,
    DynamicFineTuning,
    Focal,
    LabelSmoothing,
    RewardShaping,
    SampledReward,
)


def stop_gradient(tensor: Tensor) -> Tensor:
    """`sg` of the papers: the value without its derivative."""
    return tensor.detach()


@dataclass(frozen=True)
class Distribution:
    """The model's next-token distribution at each position and the target in it.

    Attributes:
        logits_NV: detached and before a softcap; only their order is used.
        log_probs_NV: differentiable; -inf where the logit is.
        targets_N1: int64.
        uniforms_NS: float64 in [0, 1), or None where nothing is drawn.
    """

    logits_NV: Tensor
    log_probs_NV: Tensor
    targets_N1: Tensor
    uniforms_NS: Tensor | None

    @property
    def target_log_prob(self) -> Tensor:
        """`log p_x`, [N]."""
        return self.log_probs_NV.gather(1, self.targets_N1)[:, 0]

    @property
    def log_other_prob(self) -> Tensor:
        """`log(1 - p_x)`, [N], from the other tokens alone."""
        return self.log_probs_NV.scatter(1, self.targets_N1, -torch.inf).logsumexp(1)

    @property
    def plogp_ready_NV(self) -> Tensor:
        """Log-probabilities with 0 in place of -inf, for products with p = 0."""
        return self.log_probs_NV.masked_fill(self.log_probs_NV == -torch.inf, 0)

    def head_NV(self, top_k: int) -> Tensor:
        """Whether each token is among the `top_k` largest finite logits or ties with the last of them."""
        kth_N1 = self.logits_NV.topk(min(top_k, self.logits_NV.shape[1]), dim=1).values[:, -1:]
        return (self.logits_NV >= kth_N1) & (self.logits_NV > -torch.inf)

    def is_target_NV(self) -> Tensor:
        """Whether each token is the target."""
        return torch.zeros_like(self.logits_NV, dtype=torch.bool).scatter(1, self.targets_N1, True)


def cross_entropy(settings: CrossEntropy, model: Distribution) -> Tensor:
    """`-log p_x`."""
    return -model.target_log_prob


def dynamic_fine_tuning(settings: DynamicFineTuning, model: Distribution) -> Tensor:
    """`-sg(p_x) log p_x`."""
    log_prob = model.target_log_prob
    return -stop_gradient(log_prob.exp()) * log_prob


def focal(settings: Focal, model: Distribution) -> Tensor:
    """`-(1 - p_x)^gamma log p_x`."""
    if settings.gamma == 0:
        return -model.target_log_prob
    return -torch.exp(settings.gamma * model.log_other_prob) * model.target_log_prob


def label_smoothing(settings: LabelSmoothing, model: Distribution) -> Tensor:
    """`-(1 - s) log p_x - s mean_j log p_j` over the tokens with a finite logit."""
    num_finite = (model.logits_NV > -torch.inf).sum(1)
    mean_log_prob = model.plogp_ready_NV.sum(1) / num_finite
    return -(1 - settings.smoothing) * model.target_log_prob - settings.smoothing * mean_log_prob


def reward_shaping(settings: RewardShaping, model: Distribution) -> Tensor:
    """`-sum_a sg(p_a r_a) log p_a` with the rewards of eqs. 11-13; for the target, `p_x r_x` is the positive weight."""
    log_prob = model.target_log_prob
    weight = positive_weight(log_prob, model.log_other_prob, settings.beta)
    head_NV = model.head_NV(settings.top_k)
    reward_NV = torch.full_like(model.logits_NV, settings.tail_reward).masked_fill(
        head_NV, settings.head_reward
    )
    reward_NV = reward_NV.masked_fill(model.is_target_NV(), 0)
    expected_NV = stop_gradient(model.log_probs_NV.exp() * reward_NV)
    return -stop_gradient(weight) * log_prob - (expected_NV * model.plogp_ready_NV).sum(1)


def sampled_reward(settings: SampledReward, model: Distribution) -> Tensor:
    """`-mean_s sg(r(a_s)) log p(a_s)` over draws a_s from the model."""
    if model.uniforms_NS is None:
        raise RuntimeError("the sampled estimator needs uniform numbers")
    drawn_NS = draw_tokens(stop_gradient(model.log_probs_NV.exp()), model.uniforms_NS)
    log_probs_NS = model.log_probs_NV.gather(1, drawn_NS)
    draws = Draws(
        log_prob=log_probs_NS,
        is_target=drawn_NS == model.targets_N1,
        is_head=model.head_NV(settings.top_k).gather(1, drawn_NS),
    )
    rewards_NS = sampled_rewards(settings, model.target_log_prob, model.log_other_prob, draws)
    return -(stop_gradient(rewards_NS) * log_probs_NS).mean(1)


def token_metrics(model: Distribution, top_k: int) -> TokenMetrics:
    """Metrics [N] by their definitions."""
    with torch.no_grad():
        probs_NV = model.log_probs_NV.exp()
        head_NV = model.head_NV(top_k)
        target_logits_N1 = model.logits_NV.gather(1, model.targets_N1)
        rank = 1 + (model.logits_NV > target_logits_N1).sum(1)
        return TokenMetrics(
            cross_entropy=-model.target_log_prob,
            entropy=-(probs_NV * model.plogp_ready_NV).sum(1),
            head_mass=(probs_NV * head_NV).sum(1),
            head_size=head_NV.sum(1).to(probs_NV.dtype),
            target_rank=rank.to(probs_NV.dtype),
            top_prob=probs_NV.amax(1),
        )


def linear_loss(
    hidden_ND: Tensor, weight_VD: Tensor, loss_of: Callable[[Distribution], Tensor], request: LossRequest
) -> tuple[Tensor, TokenMetrics | None]:
    """As `chunked.linear_loss`, through full logits and autograd; `loss_of` is the objective's loss [N]."""
    batch = request.batch
    kept = (
        torch.arange(batch.targets_N.numel(), device=hidden_ND.device) if batch.kept is None else batch.kept
    )
    rows = batch.select(kept)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logits_NV = functional.linear(
            hidden_ND[kept].to(request.compute_dtype), weight_VD.to(request.compute_dtype)
        )
        logits_NV = logits_NV.to(request.statistics_dtype)
        given_NV, softcap = logits_NV.detach(), request.plan.logit_softcap
        if softcap is not None:
            logits_NV = capped(logits_NV, softcap)
        model = Distribution(
            logits_NV=given_NV,
            log_probs_NV=logits_NV.log_softmax(1),
            targets_N1=rows.targets_N[:, None],
            uniforms_NS=rows.uniforms_NS,
        )
        losses_K = loss_of(model)
        if request.plan.z_loss:
            losses_K = losses_K + request.plan.z_loss * logits_NV.logsumexp(1).square()
        if rows.weights_N is not None:
            losses_K = losses_K * rows.weights_N
    empty_N = torch.zeros(batch.targets_N.shape, dtype=request.statistics_dtype, device=hidden_ND.device)
    loss = losses_K.sum() if request.summed else empty_N.index_copy(0, kept, losses_K)
    if loss.requires_grad:
        loss.register_hook(_refuse_recorded_backward)  # pyright: ignore[reportUnknownMemberType]
    top_k = request.plan.metrics_top_k
    if top_k is None:
        return loss, None
    metrics = token_metrics(model, top_k).tensors()
    nan_N = torch.full_like(empty_N, torch.nan)
    return loss, TokenMetrics(*(nan_N.index_copy(0, kept, metric) for metric in metrics))


def _refuse_recorded_backward(upstream: Tensor) -> None:
    refuse_double_backward()
