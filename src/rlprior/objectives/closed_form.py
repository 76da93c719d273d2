"""Loss, gradient and metrics of a block of rows from their logits; the gradient is written over the logits.

No autograd: every step is one pass over a block that is small enough to stay in the cache.
Shape suffixes: N rows of the block, V vocabulary, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlprior.objectives.batch import TokenBatch, TokenMetrics
from rlprior.objectives.formulas import (
    Draws,
    Needs,
    RowStatistics,
    RowTerms,
    add_z_loss,
    draw_tokens,
    target_log_prob,
)
from rlprior.objectives.selection import head_threshold, row_dot

# Stands in for -inf in products with p = 0; its exponential is 0 in float32 and in float64.
LOWEST_SHIFTED_LOGIT = -1e4


@dataclass(frozen=True)
class RowPlan:
    """What to compute for each row.

    Attributes:
        terms: closed form of the objective.
        needs: the statistics that it asks for.
        metrics_top_k: head size of the metrics, or None where none are wanted. It is the objective's own where that
            selects a head, so that one selection serves both.
        logit_softcap: c where the logits z are replaced by `c tanh(z / c)` before anything else; None leaves them.
        z_loss: coefficient of the squared log normalizer that is added to the loss.
    """

    terms: Callable[[RowStatistics], RowTerms]
    needs: Needs
    metrics_top_k: int | None
    logit_softcap: float | None = None
    z_loss: float = 0.0

    @property
    def wants_metrics(self) -> bool:
        """Whether metrics are computed beside the loss."""
        return self.metrics_top_k is not None

    @property
    def top_k(self) -> int | None:
        """Size of the head to select, or None for no selection."""
        return self.needs.top_k if self.metrics_top_k is None else self.metrics_top_k

    def terms_with_z_loss(self, row: RowStatistics) -> RowTerms:
        """Loss and gradient of the objective and of the z-loss together."""
        terms = self.terms(row)
        return add_z_loss(terms, row, self.z_loss) if self.z_loss else terms


@dataclass(frozen=True)
class RowResult:
    """Unweighted loss [N] of each row, and its metrics where the plan wants them."""

    loss: Tensor
    metrics: TokenMetrics | None


@dataclass(frozen=True)
class RowSums:
    """What passes over the vocabulary add up for each row, all [N], from the shifted logits `s_j = z_j - max_i z_i`.

    Attributes:
        max: `max_i z_i`.
        target: `s_x`.
        target_mass: `exp(s_x)`.
        other_mass: sum of `exp(s_j)` over all but x.
        other_weighted: sum of `s_j exp(s_j)` over all but x, or None.
        head_mass, head_weighted: the same sums over the head without x, or None.
        finite_mean: mean of the finite `s_j`, or None.
        num_finite: how many those are, or None.
    """

    max: Tensor
    target: Tensor
    target_mass: Tensor
    other_mass: Tensor
    other_weighted: Tensor | None
    head_mass: Tensor | None
    head_weighted: Tensor | None
    finite_mean: Tensor | None
    num_finite: Tensor | None

    @property
    def total(self) -> Tensor:
        """Sum of all `exp(s_j)`: p_j is `exp(s_j) / total`."""
        return self.target_mass + self.other_mass

    def statistics(self, draws: Draws | None = None) -> RowStatistics:
        """What the closed forms ask for."""
        total_N = self.total
        log_total_N = total_N.log()
        other_prob_N = self.other_mass / total_N
        head_mass_N, tail_mass_N = other_prob_N, torch.zeros_like(other_prob_N)
        head_nats_N, tail_nats_N = None, None
        if self.other_weighted is not None:  # sum of -p log p = mass log S - (sum of e s) / S
            head_nats_N = other_prob_N * log_total_N - self.other_weighted / total_N
            tail_nats_N = torch.zeros_like(head_nats_N)
        if self.head_mass is not None:
            head_mass_N = self.head_mass / total_N
            tail_mass_N = (other_prob_N - head_mass_N).clamp_min(0)
            if self.head_weighted is not None and head_nats_N is not None:
                other_nats_N = head_nats_N
                head_nats_N = head_mass_N * log_total_N - self.head_weighted / total_N
                tail_nats_N = other_nats_N - head_nats_N
        return RowStatistics(
            log_prob=target_log_prob(self.target, self.target_mass, self.other_mass),
            prob=self.target_mass / total_N,
            other_prob=other_prob_N,
            log_normalizer=self.max + log_total_N,
            head_mass=head_mass_N,
            tail_mass=tail_mass_N,
            head_nats=head_nats_N,
            tail_nats=tail_nats_N,
            mean_log_prob=None if self.finite_mean is None else self.finite_mean - log_total_N,
            num_finite=self.num_finite,
            draws=draws,
        )


class Scratch:
    """Buffers allocated once and reused: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The buffer of this name in the dtype and on the device of `like`, with its shape or another; any contents."""
        shape = tuple(like.shape) if shape is None else shape
        num_elements = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_elements:
            buffer = self._buffers[name] = like.new_empty(num_elements)
        return buffer[:num_elements].view(shape)


RowEvaluator = Callable[[Tensor, TokenBatch, RowPlan, Scratch, Tensor | None], RowResult]
"""Type of `evaluate_rows_` and of what may stand in for it."""


def evaluate_rows_(
    logits_NV: Tensor, batch: TokenBatch, plan: RowPlan, scratch: Scratch, gradient_scale_N: Tensor | None
) -> RowResult:
    """Loss and metrics of each row; the logits are overwritten.

    Args:
        logits_NV: float32 or float64. Afterwards the gradient of each row's loss times `gradient_scale_N`.
        batch: the N rows, none of which is ignored.
        gradient_scale_N: None where no gradient is wanted; the logits are then left in no useful state.
    """
    targets_N1 = batch.targets_N[:, None]
    slope_NV = None
    if plan.logit_softcap is not None:
        slope_NV = _cap_(logits_NV, plan.logit_softcap, scratch)
    shifted = _shift_by_maximum_(logits_NV, targets_N1, plan, scratch)
    masses_NV = logits_NV.exp_()
    drawn_NS = None if batch.uniforms_NS is None else draw_tokens(masses_NV, batch.uniforms_NS)
    drawn_masses_NS = None if drawn_NS is None else masses_NV.gather(1, drawn_NS)
    target_mass_N = masses_NV.gather(1, targets_N1)[:, 0]
    masses_NV.scatter_(1, targets_N1, 0)  # the sums that follow leave the target out, so that nothing cancels
    other_mass_N = masses_NV.sum(1)
    total_N = target_mass_N + other_mass_N
    draws = None
    if drawn_NS is not None and drawn_masses_NS is not None:
        draws = _draw_statistics(drawn_NS, drawn_masses_NS, targets_N1, total_N, shifted)
    row = _row_statistics(masses_NV, target_mass_N, other_mass_N, shifted, draws, scratch)
    terms = plan.terms_with_z_loss(row)
    result = RowResult(loss=terms.loss, metrics=_token_metrics(row, shifted))
    if gradient_scale_N is not None:  # last: it uses up the buffers
        _write_gradient_(masses_NV, targets_N1, drawn_NS, total_N, terms, shifted, plan, gradient_scale_N)
        if slope_NV is not None:
            logits_NV.mul_(slope_NV)
    return result


def _cap_(logits_NV: Tensor, softcap: float, scratch: Scratch) -> Tensor:
    """Replace z by `c tanh(z / c)` and return the slope of that, `1 - tanh(z / c)^2`; -inf stays -inf, with slope 0."""
    is_excluded_NV = logits_NV == -torch.inf
    logits_NV.div_(softcap).tanh_()
    slope_NV = torch.mul(logits_NV, logits_NV, out=scratch.take("slope", logits_NV)).neg_().add_(1)
    logits_NV.mul_(softcap).masked_fill_(is_excluded_NV, -torch.inf)
    return slope_NV


@dataclass(frozen=True)
class _Shifted:
    """What is read off the logits before their exponential replaces them; masks hold 0 and 1 in the logits' dtype."""

    target_N: Tensor  # z_x - max_j z_j
    max_N: Tensor
    head_NV: Tensor | None
    head_holds_target_N: Tensor | None
    copy_NV: Tensor | None  # z - max z, finite everywhere
    finite_NV: Tensor | None
    mean_N: Tensor | None  # of z - max z over the finite logits
    target_rank_N: Tensor | None


def _shift_by_maximum_(logits_NV: Tensor, targets_N1: Tensor, plan: RowPlan, scratch: Scratch) -> _Shifted:
    target_logits_N1 = logits_NV.gather(1, targets_N1)
    target_rank_N, head_NV, head_holds_target_N = None, None, None
    if plan.wants_metrics:
        target_rank_N = torch.gt(logits_NV, target_logits_N1, out=scratch.take("head", logits_NV)).sum(1) + 1
    if plan.top_k is not None:
        head_NV = scratch.take("head", logits_NV)
        threshold_N1 = head_threshold(logits_NV, plan.top_k, head_NV)
        torch.ge(logits_NV, threshold_N1, out=head_NV)
        head_holds_target_N = (target_logits_N1 >= threshold_N1)[:, 0]
    max_N1 = logits_NV.amax(1, keepdim=True)
    logits_NV.sub_(max_N1)
    copy_NV, finite_NV, mean_N = None, None, None
    if plan.needs.nats or plan.wants_metrics:
        copy_NV = torch.clamp(logits_NV, min=LOWEST_SHIFTED_LOGIT, out=scratch.take("shifted", logits_NV))
    if plan.needs.mean_log_prob:
        finite_NV = torch.gt(logits_NV, -torch.inf, out=scratch.take("finite", logits_NV))
        mean_N = logits_NV.masked_fill(finite_NV == 0, 0).sum(1) / finite_NV.sum(1)
    return _Shifted(
        target_N=(target_logits_N1 - max_N1)[:, 0],
        max_N=max_N1[:, 0],
        head_NV=head_NV,
        head_holds_target_N=head_holds_target_N,
        copy_NV=copy_NV,
        finite_NV=finite_NV,
        mean_N=mean_N,
        target_rank_N=target_rank_N,
    )


def _row_statistics(
    masses_NV: Tensor,
    target_mass_N: Tensor,
    other_mass_N: Tensor,
    shifted: _Shifted,
    draws: Draws | None,
    scratch: Scratch,
) -> RowStatistics:
    """Statistics of rows from their masses, in which the target's is 0; `shifted.copy_NV` is used up."""
    other_weighted_N, head_mass_N, head_weighted_N = None, None, None
    if shifted.copy_NV is not None:
        other_weighted_N = row_dot(shifted.copy_NV, masses_NV, shifted.copy_NV)
    if shifted.head_NV is not None:
        product_NV = scratch.take("product", masses_NV)
        head_mass_N = row_dot(masses_NV, shifted.head_NV, product_NV)
        if shifted.copy_NV is not None:
            head_weighted_N = row_dot(shifted.copy_NV, shifted.head_NV, product_NV)
    return RowSums(
        max=shifted.max_N,
        target=shifted.target_N,
        target_mass=target_mass_N,
        other_mass=other_mass_N,
        other_weighted=other_weighted_N,
        head_mass=head_mass_N,
        head_weighted=head_weighted_N,
        finite_mean=shifted.mean_N,
        num_finite=None if shifted.finite_NV is None else shifted.finite_NV.sum(1),
    ).statistics(draws)


def _draw_statistics(
    drawn_NS: Tensor, drawn_masses_NS: Tensor, targets_N1: Tensor, total_N: Tensor, shifted: _Shifted
) -> Draws:
    is_target_NS = drawn_NS == targets_N1
    if shifted.head_NV is None:
        is_head_NS = torch.ones_like(is_target_NS)
    else:
        is_head_NS = shifted.head_NV.gather(1, drawn_NS) > 0
    log_prob_NS = drawn_masses_NS.log() - total_N.log()[:, None]
    return Draws(log_prob=log_prob_NS, is_target=is_target_NS, is_head=is_head_NS)


def _write_gradient_(
    masses_NV: Tensor,
    targets_N1: Tensor,
    drawn_NS: Tensor | None,
    total_N: Tensor,
    terms: RowTerms,
    shifted: _Shifted,
    plan: RowPlan,
    gradient_scale_N: Tensor,
) -> None:
    """Replace the masses by the gradient; see `RowTerms` for its parts."""
    factor_N = gradient_scale_N / total_N
    if shifted.head_NV is None or plan.needs.top_k is None:
        masses_NV.mul_((terms.head_scale * factor_N)[:, None])
    else:
        difference_N = terms.head_scale - terms.tail_scale
        scale_NV = shifted.head_NV.mul_((difference_N * factor_N)[:, None])
        masses_NV.mul_(scale_NV.add_((terms.tail_scale * factor_N)[:, None]))
    if terms.shift is not None and shifted.finite_NV is not None:
        masses_NV.sub_(shifted.finite_NV.mul_((terms.shift * gradient_scale_N)[:, None]))
    if terms.draw_gradients_NS is not None and drawn_NS is not None:
        masses_NV.scatter_add_(1, drawn_NS, terms.draw_gradients_NS * gradient_scale_N[:, None])
    masses_NV.scatter_(1, targets_N1, (terms.target_gradient * gradient_scale_N)[:, None])


def _token_metrics(row: RowStatistics, shifted: _Shifted) -> TokenMetrics | None:
    if shifted.target_rank_N is None or shifted.head_NV is None or shifted.head_holds_target_N is None:
        return None
    return token_metrics(row, shifted.head_holds_target_N, shifted.head_NV.sum(1), shifted.target_rank_N)


def token_metrics(
    row: RowStatistics, head_holds_target_N: Tensor, head_size_N: Tensor, target_rank_N: Tensor
) -> TokenMetrics | None:
    """Metrics of rows, or None where the statistics lack a sum of `-p log p`."""
    if row.head_nats is None or row.tail_nats is None:
        return None
    zero_N = torch.zeros_like(row.prob)
    return TokenMetrics(
        cross_entropy=-row.log_prob,
        entropy=row.head_nats + row.tail_nats + torch.where(row.prob > 0, -row.prob * row.log_prob, zero_N),
        head_mass=row.head_mass + torch.where(head_holds_target_N, row.prob, zero_N),
        head_size=head_size_N,
        target_rank=target_rank_N,
    )
