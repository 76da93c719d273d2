"""Losses on `hidden x weight` without the [N, V] logits, and on given logits, with gradients in closed form.

The logits of a chunk of positions exist only while the chunk is processed. Where the loss is summed, its gradient is
formed in the same pass, so that the whole costs three matrix products, as cross-entropy on full logits does. Where every
position's loss is returned, the backward pass computes the logits again: the gradient of the weight mixes positions
whose upstream gradients are not known before.

Shape suffixes: N flattened positions, R positions of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import Function

from rlprior.objectives.batch import TokenBatch, TokenMetrics, statistics_dtype
from rlprior.objectives.chunk_sizes import choose_block_rows, choose_chunk_rows
from rlprior.objectives.closed_form import RowEvaluator, RowPlan, Scratch, evaluate_rows_
from rlprior.objectives.parallel import ShardColumns


@dataclass(frozen=True)
class LossRequest:
    """What a loss needs beside its differentiable tensors.

    Attributes:
        batch: flattened targets.
        plan: what to compute for each row.
        summed: return the sum instead of a loss for each position.
        compute_dtype: dtype of the logits.
        chunk_rows: positions whose logits are held at a time; None chooses by device, vocabulary, width and memory.
        shard: where weight and logits hold a part of the vocabulary.
        kernels: evaluates rows in place of the generic code, on logits in the compute dtype; None is the generic code,
            whose logits have the dtype of the statistics.
    """

    batch: TokenBatch
    plan: RowPlan
    summed: bool
    compute_dtype: torch.dtype
    chunk_rows: int | None = None
    shard: ShardColumns | None = None
    kernels: RowEvaluator | None = None

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Dtype of sums, losses and metrics."""
        return statistics_dtype(self.compute_dtype)

    @property
    def logits_dtype(self) -> torch.dtype:
        """Dtype of a chunk's logits, and of the gradient that replaces them."""
        return self.statistics_dtype if self.kernels is None else self.compute_dtype


def linear_loss(
    hidden_ND: Tensor, weight_VD: Tensor, request: LossRequest
) -> tuple[Tensor, TokenMetrics | None]:
    """Weighted loss of the logits `hidden @ weight.T`, one sum or [N], and the metrics if the plan wants them."""
    records_grad = torch.is_grad_enabled()
    function = _SummedLinearLoss if request.summed else _LinearLoss
    return _unpack(_apply(function, hidden_ND, weight_VD, request, records_grad), request)


def logits_loss(logits_NV: Tensor, request: LossRequest) -> tuple[Tensor, TokenMetrics | None]:
    """Weighted loss of given logits, one sum or [N], and the metrics if the plan wants them."""
    loss_N, metrics = _unpack(_apply(_LogitsLoss, logits_NV, request, torch.is_grad_enabled()), request)
    return (loss_N.sum() if request.summed else loss_N), metrics


def refuse_double_backward() -> None:
    """Raise where the backward pass is itself recorded: closed-form and surrogate gradients have no valid second one."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "rlprior.objectives does not support double backward; differentiate without create_graph=True"
        )


def _apply(function: type[Function], *args: object) -> tuple[Tensor, ...]:
    apply = cast(Callable[..., tuple[Tensor, ...]], function.apply)  # pyright: ignore[reportUnknownMemberType]
    return apply(*args)


def _unpack(outputs: tuple[Tensor, ...], request: LossRequest) -> tuple[Tensor, TokenMetrics | None]:
    return outputs[0], (TokenMetrics(*outputs[1:]) if request.plan.wants_metrics else None)


class _SummedLinearLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, request: LossRequest, records_grad: bool
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight = (records_grad and needed for needed in ctx.needs_input_grad[:2])
        result = _Pass(request, hidden_ND.device)
        result.run_linear(hidden_ND, weight_VD, None, wants_hidden=wants_hidden, wants_weight=wants_weight)
        ctx.save_for_backward(result.hidden_gradient_ND, result.weight_gradient_VD)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype)
        return _finish(ctx, result.loss_N.sum(), result.metrics)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if upstream[0] is None:
            return None, None, None, None
        hidden_gradient_ND, weight_gradient_VD = ctx.saved_tensors
        scale_11 = upstream[0].reshape(1, 1)
        return (
            _scale(hidden_gradient_ND, scale_11, ctx.dtypes[0]),
            _scale(weight_gradient_VD, scale_11, ctx.dtypes[1]),
            None,
            None,
        )


class _LinearLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, request: LossRequest, records_grad: bool
    ) -> tuple[Tensor, ...]:
        result = _Pass(request, hidden_ND.device)
        result.run_linear(hidden_ND, weight_VD, None, wants_hidden=False, wants_weight=False)
        # The batch too: its tensors may be the caller's, and a change before the backward pass then raises.
        ctx.save_for_backward(hidden_ND, weight_VD, *request.batch.tensors())
        ctx.request = request
        return _finish(ctx, result.loss_N, result.metrics)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if upstream[0] is None:
            return None, None, None, None
        hidden_ND, weight_VD, *batch = ctx.saved_tensors
        plan = replace(ctx.request.plan, metrics_top_k=None)
        request = replace(ctx.request, batch=TokenBatch(*batch), plan=plan)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        result = _Pass(request, hidden_ND.device)
        result.run_linear(
            hidden_ND, weight_VD, upstream[0], wants_hidden=wants_hidden, wants_weight=wants_weight
        )
        return (
            _cast(result.hidden_gradient_ND, hidden_ND.dtype),
            _cast(result.weight_gradient_VD, weight_VD.dtype),
            None,
            None,
        )


class _LogitsLoss(Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, request: LossRequest, records_grad: bool) -> tuple[Tensor, ...]:
        result = _Pass(request, logits_NV.device)
        gradient_NV = torch.zeros_like(logits_NV) if records_grad and ctx.needs_input_grad[0] else None
        result.run_logits(logits_NV, gradient_NV)
        ctx.save_for_backward(gradient_NV, request.batch.weights_N)
        ctx.kept = request.batch.kept
        return _finish(ctx, result.loss_N, result.metrics)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        gradient_NV, weights_N = ctx.saved_tensors
        if upstream[0] is None or gradient_NV is None:
            return None, None, None
        scale_N = upstream[0] if weights_N is None else upstream[0] * weights_N
        if ctx.kept is not None:  # whatever arrives at an ignored position, its gradient is 0
            scale_N = torch.zeros_like(scale_N).index_copy_(0, ctx.kept, scale_N[ctx.kept])
        return _scale(gradient_NV, scale_N[:, None], gradient_NV.dtype), None, None


def _finish(ctx: Any, loss: Tensor, metrics: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    ctx.mark_non_differentiable(*metrics)
    ctx.set_materialize_grads(False)
    return (loss, *metrics)


def _cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


def _scale(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Product rounded once, to `dtype`; never in place, so that a retained graph can run backward again."""
    if gradient is None:
        return None
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


class _Pass:
    """One pass over the positions; its attributes are what came out of it."""

    def __init__(self, request: LossRequest, device: torch.device) -> None:
        num_positions = request.batch.targets_N.numel()
        self.request = request
        self.loss_N = torch.zeros(num_positions, dtype=request.statistics_dtype, device=device)
        self.metrics: tuple[Tensor, ...] = ()
        if request.plan.wants_metrics:
            self.metrics = tuple(torch.full_like(self.loss_N, torch.nan) for _ in fields(TokenMetrics))
        self.hidden_gradient_ND: Tensor | None = None
        self.weight_gradient_VD: Tensor | None = None
        self._scratch = Scratch()

    def run_linear(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        upstream_N: Tensor | None,
        *,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> None:
        """Losses of `hidden @ weight.T` and the gradients wanted, each position's scaled by `upstream_N` (None is 1)."""
        dtype = self.request.statistics_dtype
        if wants_hidden:
            self.hidden_gradient_ND = torch.zeros_like(hidden_ND, dtype=dtype)
        if wants_weight:
            self.weight_gradient_VD = torch.zeros_like(weight_VD, dtype=dtype)
        weight_VD = weight_VD.to(self.request.compute_dtype)
        scale_N, unit = self._gradient_scale(upstream_N) if wants_hidden or wants_weight else (None, None)
        with torch.autocast(hidden_ND.device.type, enabled=False):  # the dtypes are chosen here
            for start, stop in self._chunks(*weight_VD.shape):
                self._run_chunk(hidden_ND, weight_VD, start, stop, scale_N)
        for gradient in (self.hidden_gradient_ND, self.weight_gradient_VD):
            if gradient is not None and unit is not None:
                gradient.mul_(unit)
        if self.hidden_gradient_ND is not None and self.request.shard is not None:
            self.request.shard.add_up(self.hidden_gradient_ND)

    def _gradient_scale(self, upstream_N: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Factor of each position's gradient (None is 1), and the unit that it is given in (None is 1).

        Logits and their gradient may be float16, which has no room for the sizes that factors have: with the unit, a power
        of two, the largest of them is between 1 and 2.
        """
        batch = self.request.batch
        factors = [factor_N for factor_N in (upstream_N, batch.weights_N) if factor_N is not None]
        if not factors or batch.num_targets == 0:
            return None, None
        scale_N = factors[0] if len(factors) == 1 else factors[0] * factors[1]
        if self.request.compute_dtype != torch.float16:
            return scale_N, None
        largest = scale_N[batch.positions(0, batch.num_targets)].abs().amax()
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
        unit = torch.where(torch.isfinite(largest) & (largest > 0), unit, torch.ones_like(unit))
        return scale_N / unit, unit

    def _run_chunk(
        self, hidden_ND: Tensor, weight_VD: Tensor, start: int, stop: int, scale_N: Tensor | None
    ) -> None:
        rows = self.request.batch.positions(start, stop)
        hidden_RD = hidden_ND[rows].to(self.request.compute_dtype)
        logits_RV = self._multiply(hidden_RD, weight_VD)
        gradient_RV = logits_RV[:, : weight_VD.shape[0]]
        wants_gradient = self.hidden_gradient_ND is not None or self.weight_gradient_VD is not None
        scale_R = None
        if wants_gradient:
            scale_R = torch.ones_like(self.loss_N[rows]) if scale_N is None else scale_N[rows]
        self._evaluate_chunk_(logits_RV, start, scale_R)
        if self.hidden_gradient_ND is not None:
            self.hidden_gradient_ND[rows] = _product(gradient_RV, weight_VD, self.hidden_gradient_ND.dtype)
        if self.weight_gradient_VD is not None:
            _add_product_(self.weight_gradient_VD, gradient_RV.t(), hidden_RD)

    def run_logits(self, logits_NV: Tensor, gradient_NV: Tensor | None) -> None:
        """Losses of given logits; the gradient of each without its weight goes to `gradient_NV`, which holds zeros."""
        with torch.autocast(logits_NV.device.type, enabled=False):
            num_columns = logits_NV.shape[1]
            for start, stop in self._chunks(num_columns, 0):
                rows = self.request.batch.positions(start, stop)
                logits_RV = self._logits_buffer(stop - start, num_columns)
                logits_RV[:, :num_columns] = logits_NV[rows]
                self._exclude_padding_(logits_RV)
                scale_R = None if gradient_NV is None else torch.ones_like(self.loss_N[rows])
                self._evaluate_chunk_(logits_RV, start, scale_R)
                if gradient_NV is not None:  # no factor before it is rounded to the dtype of the logits
                    gradient_NV[rows] = logits_RV[:, :num_columns].to(gradient_NV.dtype)

    def _chunks(self, num_columns: int, width: int) -> Iterator[tuple[int, int]]:
        num_targets, shard = self.request.batch.num_targets, self.request.shard
        if shard is not None:
            num_columns = shard.max_columns  # every process has the same chunks
        max_rows = self.request.chunk_rows or choose_chunk_rows(
            self.loss_N.device, num_columns, width, self.request.logits_dtype.itemsize
        )
        for start in range(0, num_targets, max_rows):
            yield start, min(start + max_rows, num_targets)

    def _multiply(self, hidden_RD: Tensor, weight_VD: Tensor) -> Tensor:
        num_columns = weight_VD.shape[0]
        logits_RV = self._logits_buffer(hidden_RD.shape[0], num_columns)
        if hidden_RD.dtype == logits_RV.dtype:
            torch.mm(hidden_RD, weight_VD.t(), out=logits_RV[:, :num_columns])
        else:
            logits_RV[:, :num_columns] = hidden_RD @ weight_VD.t()
        return self._exclude_padding_(logits_RV)

    def _logits_buffer(self, num_rows: int, num_columns: int) -> Tensor:
        """Room for logits; a shard has one column more, which stands for the tokens of other processes."""
        width = num_columns if self.request.shard is None else num_columns + 1
        like = self.loss_N.new_empty(0, dtype=self.request.logits_dtype)
        return self._scratch.take("logits", like, (num_rows, width))

    def _exclude_padding_(self, logits_RV: Tensor) -> Tensor:
        if self.request.shard is not None:
            logits_RV[:, self.request.shard.num_tokens :] = -torch.inf
        return logits_RV

    def _evaluate_chunk_(self, logits_RV: Tensor, start: int, scale_R: Tensor | None) -> None:
        """Record losses and metrics from the `start`-th position on, and leave the gradient in `logits_RV`."""
        batch, shard = self.request.batch, self.request.shard
        evaluate_ = self.request.kernels or partial(evaluate_rows_, shard=shard)
        num_rows = block_rows = logits_RV.shape[0]
        if (
            shard is None and self.request.kernels is None
        ):  # fewer blocks, fewer collectives; kernels need no buffers
            block_rows = choose_block_rows(logits_RV.device, logits_RV.shape[1])
        for low in range(0, num_rows, block_rows):
            high = min(low + block_rows, num_rows)
            rows = batch.positions(start + low, start + high)
            block = batch.select(rows)
            scale_N = None if scale_R is None else scale_R[low:high]
            result = evaluate_(logits_RV[low:high], block, self.request.plan, self._scratch, scale_N)
            self.loss_N[rows] = result.loss if block.weights_N is None else result.loss * block.weights_N
            if result.metrics is not None:
                for whole_N, part_N in zip(self.metrics, result.metrics.tensors(), strict=True):
                    whole_N[rows] = part_N


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` summed and returned in `dtype`, with the speed of the dtype of `right` where there is any."""
    if left.dtype == right.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left.to(right.dtype), right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, in its dtype, as `_product` does."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # no product of the size of `total` on the way
        torch.addmm(total, left.to(right.dtype), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
