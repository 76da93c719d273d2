"""Loss, gradient and metrics of a block of rows from their logits; the gradient is written over the logits.

No autograd: every step is one pass over a block that is small enough to stay in the cache.
Shape suffixes: N rows of the block, V columns of the vocabulary, C candidate columns for the head, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from rlprior.objectives.batch import TokenBatch, TokenMetrics
from rlprior.objectives.formulas import (
    Draws,
    Needs,
    RowStatistics,
    RowTerms,
    add_z_loss,
    capped,
    draw_tokens,
    target_log_prob,
)
from rlprior.objectives.parallel import ShardColumns
from rlprior.objectives.selection import (
    Head,
    find_candidates,
    find_head,
    head_threshold,
    merged_threshold,
)

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
        logit_softcap: c where the logits z are replaced by `c tanh(z / c)` once their order is known; None leaves them.
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

    @property
    def needs_head_nats(self) -> bool:
        """Whether a sum of -p log p is wanted for any tokens at all."""
        return self.needs.head_nats or self.needs.tail_nats or self.wants_metrics

    @property
    def needs_all_nats(self) -> bool:
        """Whether that sum is wanted for more than the head."""
        return self.needs.tail_nats or self.wants_metrics or (self.needs.head_nats and self.top_k is None)


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
        # A sum of -p log p is mass log S - (sum of e s) / S over the same tokens.
        if self.other_weighted is not None:
            head_nats_N = other_prob_N * log_total_N - self.other_weighted / total_N
            tail_nats_N = torch.zeros_like(head_nats_N)
        if self.head_mass is not None:
            head_mass_N = self.head_mass / total_N
            tail_mass_N = (other_prob_N - head_mass_N).clamp_min(0)
            if self.head_weighted is not None:
                other_nats_N = head_nats_N
                head_nats_N = head_mass_N * log_total_N - self.head_weighted / total_N
                tail_nats_N = None if other_nats_N is None else other_nats_N - head_nats_N
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
    logits_NV: Tensor,
    batch: TokenBatch,
    plan: RowPlan,
    scratch: Scratch,
    gradient_scale_N: Tensor | None,
    shard: ShardColumns | None = None,
) -> RowResult:
    """Loss and metrics of each row; the logits are overwritten.

    Args:
        logits_NV: float32 or float64. Afterwards the gradient of each row's loss times `gradient_scale_N`.
        batch: the N rows, none of which is ignored.
        gradient_scale_N: None where no gradient is wanted; the logits are then left in no useful state.
        shard: where the columns are part of a larger vocabulary; the last of them must then hold -inf, and its
            gradient means nothing.
    """
    targets_N = batch.targets_N if shard is None else shard.local_targets(batch.targets_N, logits_NV.shape[1])
    rows = _Rows(logits_NV, targets_N[:, None], plan, scratch, shard)
    rows.read_order()
    slope_NV = None if plan.logit_softcap is None else rows.cap_(plan.logit_softcap)
    rows.normalise_()
    drawn_NS = None if batch.uniforms_NS is None else draw_tokens(rows.probs_NV, batch.uniforms_NS)
    draws = None if drawn_NS is None else rows.describe_draws(drawn_NS)
    sums = rows.sum_masses_()
    row = sums.statistics(draws)
    terms = plan.terms_with_z_loss(row)
    result = RowResult(loss=terms.loss, metrics=rows.metrics(row, sums))
    if gradient_scale_N is not None:  # last: it uses up the buffers
        rows.write_gradient_(terms, drawn_NS, gradient_scale_N, sums.total)
        if slope_NV is not None:
            logits_NV.mul_(slope_NV)
    return result


def _cap_(logits_NV: Tensor, softcap: float, scratch: Scratch) -> Tensor:
    """`capped` in place; returns its slope, 0 at -inf."""
    is_excluded_NV = logits_NV == -torch.inf
    logits_NV.div_(softcap)
    # 1 - tanh^2 would cancel.
    slope_NV = torch.cosh(logits_NV, out=scratch.take("slope", logits_NV)).reciprocal_().square_()
    logits_NV.tanh_().mul_(softcap).masked_fill_(is_excluded_NV, -torch.inf)
    return slope_NV


class _Rows:
    """A block of rows on its way from logits to gradient: one step a method, in their order.

    Masses are `exp(z - max)` with the maximum over the whole vocabulary. `probs_NV` are the probabilities among the
    columns of this process, and `unit_N` is the mass of a probability of 1. `sums` run over each row, the target's mass
    left out; `sum_masses_` extends them over the whole vocabulary.
    """

    def __init__(
        self,
        logits_NV: Tensor,
        targets_N1: Tensor,
        plan: RowPlan,
        scratch: Scratch,
        shard: ShardColumns | None,
    ) -> None:
        self.logits_NV = logits_NV
        self.targets_N1 = targets_N1
        self.plan = plan
        self.scratch = scratch
        self.shard = shard
        self.sums: dict[str, Tensor] = {}
        self.head: Head | None = None
        self.finite_NV: Tensor | None = None
        self.target_N1 = logits_NV.gather(1, targets_N1)

    def read_order(self) -> None:
        """Find what depends on the order of the logits, before a softcap rounds some to ties: maximum, head, target's rank."""
        logits_NV = self.logits_NV
        candidates = None if self.plan.top_k is None else find_candidates(logits_NV, self.plan.top_k)
        self.local_max_N1 = logits_NV.amax(1, keepdim=True) if candidates is None else candidates.max_N1
        self.max_N1 = self.local_max_N1
        if self.shard is not None:
            extremes_N2 = torch.cat([self.target_N1, self.local_max_N1], dim=1)
            extremes_N2 = self.shard.gather(extremes_N2).amax(0)
            self.target_N1, self.max_N1 = extremes_N2[:, :1], extremes_N2[:, 1:]
        if self.plan.wants_metrics:
            mask_NV = self.scratch.take("mask", logits_NV)
            self.sums["num_greater"] = torch.gt(logits_NV, self.target_N1, out=mask_NV).sum(1)
        if candidates is not None:
            mask_NV = self.scratch.take("mask", logits_NV)
            if self.shard is None:
                threshold_N1 = head_threshold(candidates, mask_NV)
            else:
                threshold_N1 = merged_threshold(self.shard.gather(candidates.largest_Nk))
            self.head = find_head(candidates, threshold_N1, mask_NV, for_all=self.plan.needs.num_draws > 0)
            self.sums["head_size"] = self.head.is_member_NC.sum(1)
            self.head_holds_target_N = (self.target_N1 >= threshold_N1)[:, 0]
        if self.plan.needs.mean_log_prob:
            self.finite_NV = torch.gt(logits_NV, -torch.inf, out=self.scratch.take("finite", logits_NV))
            self.sums["num_finite"] = self.finite_NV.sum(1)

    def cap_(self, softcap: float) -> Tensor:
        """Replace all logits by the capped ones, and return the slope of that."""
        slope_NV = _cap_(self.logits_NV, softcap, self.scratch)
        self.target_N1 = capped(self.target_N1, softcap)
        self.max_N1, self.local_max_N1 = capped(self.max_N1, softcap), capped(self.local_max_N1, softcap)
        if self.head is not None and self.head.columns_NC is not None:
            self.head = replace(self.head, values_NC=capped(self.head.values_NC, softcap))
        return slope_NV

    def normalise_(self) -> None:
        """Probabilities, in a buffer of their own; the logits are shifted by their maximum where they are read again."""
        logits_NV, plan = self.logits_NV, self.plan
        has_dense_head = self.head is not None and self.head.columns_NC is None
        if plan.needs_all_nats or (plan.needs_head_nats and has_dense_head) or self.finite_NV is not None:
            logits_NV.sub_(self.max_N1)
        self.probs_NV = torch.softmax(logits_NV, 1, out=self.scratch.take("probs", logits_NV))
        self.unit_N = 1 / self.probs_NV.amax(1)  # the most probable token has mass 1
        if self.shard is not None:
            self.unit_N = self.unit_N * torch.exp(self.local_max_N1 - self.max_N1)[:, 0]
            excluded_N1 = self.local_max_N1 == -torch.inf  # nothing finite here: 0 / 0
            self.probs_NV.masked_fill_(excluded_N1, 0)
            self.unit_N.masked_fill_(excluded_N1[:, 0], 0)
        if self.finite_NV is not None:
            self.sums["finite"] = logits_NV.masked_fill(self.finite_NV == 0, 0).sum(1)

    def sum_masses_(self) -> RowSums:
        """Sums of masses and of masses times `z - max`; without the target's, so that nothing cancels."""
        probs_NV, unit_N = self.probs_NV.scatter_(1, self.targets_N1, 0), self.unit_N
        self.sums["others"] = probs_NV.sum(1) * unit_N
        if self.plan.needs_all_nats:
            self.sums["others_dot"] = _dot(probs_NV, self.logits_NV) * unit_N
        if self.head is not None:
            head_probs_NC, shifted_NC = self._head_probs(self.head)
            self.sums["head"] = head_probs_NC.sum(1) * unit_N
            if self.plan.needs_head_nats:
                self.sums["head_dot"] = _dot(head_probs_NC, shifted_NC) * unit_N
        if self.shard is not None:
            totals_SN = self.shard.add_up(torch.stack(list(self.sums.values())))
            self.sums = dict(zip(self.sums, totals_SN.unbind(), strict=True))
        sums, wants_mean = self.sums, self.plan.needs.mean_log_prob
        target_N = (self.target_N1 - self.max_N1)[:, 0]
        return RowSums(
            max=self.max_N1[:, 0],
            target=target_N,
            target_mass=torch.exp(target_N),
            other_mass=sums["others"],
            other_weighted=sums.get("others_dot"),
            head_mass=sums.get("head"),
            head_weighted=sums.get("head_dot"),
            finite_mean=sums["finite"] / sums["num_finite"] if wants_mean else None,
            num_finite=sums["num_finite"] if wants_mean else None,
        )

    def describe_draws(self, drawn_NS: Tensor) -> Draws:
        """Draws among all columns, described before the target's probability is taken out."""
        log_prob_NS = self.probs_NV.gather(1, drawn_NS).log()
        if self.head is None:
            is_head_NS = torch.ones_like(drawn_NS, dtype=torch.bool)
        else:
            is_head_NS = self.head.is_member_NC.gather(1, drawn_NS) > 0
        return Draws(log_prob=log_prob_NS, is_target=drawn_NS == self.targets_N1, is_head=is_head_NS)

    def metrics(self, row: RowStatistics, sums: RowSums) -> TokenMetrics | None:
        """Measurements of the model, where the plan wants them."""
        if self.head is None or not self.plan.wants_metrics:
            return None
        return token_metrics(
            row, sums, self.head_holds_target_N, self.sums["head_size"], 1 + self.sums["num_greater"]
        )

    def write_gradient_(
        self, terms: RowTerms, drawn_NS: Tensor | None, scale_N: Tensor, total_N: Tensor
    ) -> None:
        """Replace the logits by the gradient; see `RowTerms` for its parts. The masks are used up."""
        gradient_NV, head = self.logits_NV, self.head if self.plan.needs.top_k is not None else None
        factor_N1 = (scale_N * self.unit_N / total_N)[:, None]
        head_N1, tail_N1 = terms.head_scale[:, None] * factor_N1, terms.tail_scale[:, None] * factor_N1
        if head is None:
            torch.mul(self.probs_NV, head_N1, out=gradient_NV)
        elif head.columns_NC is None:
            scale_NV = head.is_member_NC.mul_(head_N1 - tail_N1).add_(tail_N1)
            torch.mul(self.probs_NV, scale_NV, out=gradient_NV)
        else:
            torch.mul(self.probs_NV, tail_N1, out=gradient_NV)
            scale_NC = head.is_member_NC * (head_N1 - tail_N1) + tail_N1
            gradient_NV.scatter_(1, head.columns_NC, self.candidate_probs_NC * scale_NC)
        if terms.shift is not None and self.finite_NV is not None:
            gradient_NV.sub_(self.finite_NV.mul_((terms.shift * scale_N)[:, None]))
        if terms.draw_gradients_NS is not None and drawn_NS is not None:
            gradient_NV.scatter_add_(1, drawn_NS, terms.draw_gradients_NS * scale_N[:, None])
        gradient_NV.scatter_(1, self.targets_N1, (terms.target_gradient * scale_N)[:, None])

    def _head_probs(self, head: Head) -> tuple[Tensor, Tensor]:
        """Probabilities of the head, 0 elsewhere, and shifted logits beside them."""
        if head.columns_NC is None:
            product_NV = self.scratch.take("product", self.probs_NV)
            return torch.mul(self.probs_NV, head.is_member_NC, out=product_NV), self.logits_NV
        self.candidate_probs_NC = self.probs_NV.gather(1, head.columns_NC)
        return self.candidate_probs_NC * head.is_member_NC, head.values_NC - self.max_N1


def token_metrics(
    row: RowStatistics,
    sums: RowSums,
    head_holds_target_N: Tensor,
    head_size_N: Tensor,
    target_rank_N: Tensor,
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
        top_prob=1 / sums.total,  # its mass is 1
    )


def _dot(probs_NV: Tensor, shifted_NV: Tensor) -> Tensor:
    """Sum [N] of p (z - max), where p = 0 counts for nothing even at -inf."""
    dot = cast(Callable[[Tensor, Tensor], Tensor], torch.linalg.vecdot)  # pyright: ignore[reportUnknownMemberType]
    dot_N = dot(probs_NV, shifted_NV)
    if bool(dot_N.isnan().any()):
        dot_N = dot(probs_NV, shifted_NV.clamp(min=LOWEST_SHIFTED_LOGIT))
    return dot_N
