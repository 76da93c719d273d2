# pyright: basic, reportCallIssue=false, reportIndexIssue=false
# Launch options such as num_warps are not parameters of a kernel, and older releases of triton have no types at all.
"""Rows evaluated by the Triton kernels: the same results as `closed_form.evaluate_rows_`, from logits of two bytes.

The kernels read the vocabulary; the formulas see one number per row, as everywhere else. Importing this module imports
triton. Shape suffixes: R rows, V vocabulary, B blocks of columns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from rlprior.objectives import kernels
from rlprior.objectives.batch import TokenBatch
from rlprior.objectives.closed_form import (
    RowPlan,
    RowResult,
    RowSums,
    Scratch,
    token_metrics,
)
from rlprior.objectives.formulas import RowTerms

# Columns that share a maximum. The k blocks with the largest maxima hold the k largest logits: a search reads k pieces
# of two memory sectors (32 numbers of two bytes) instead of the row.
BLOCK_COLUMNS = 32
# Tiles and warps are powers of two. Passes over the logits are bound by memory: 4096 columns on 8 warps are 16 for each
# thread, two loads of 16 bytes in bfloat16. At the 80 registers that this takes, three programs share a multiprocessor
# and have 24 KiB of reads on their way, more than the latency times the bandwidth of an H100 asks of it.
PASS_BLOCKS = 128
PASS_WARPS = 8
# A search reads from cache and waits for its own sums, so fewer warps wait less: 8 maxima, or 32 candidates, for each
# thread; a head of up to 128 is one tile.
SEARCH_MAXIMA = 1024
SEARCH_BLOCKS = 128
SEARCH_WARPS = 4

# Low bits that are constant in a float32 made from a narrower dtype: the search leaves them out.
SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}

DTYPES = tuple(SHIFTS)
"""Dtypes of logits that the kernels take."""

IS_INTERPRETED = not isinstance(kernels.sum_rows, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, on tensors of any device: TRITON_INTERPRET was set on import."""


def evaluate_rows_(
    logits_RV: Tensor, batch: TokenBatch, plan: RowPlan, scratch: Scratch, gradient_scale_R: Tensor | None
) -> RowResult:
    """Loss and metrics of each row; the logits are overwritten. As `closed_form.evaluate_rows_`.

    Args:
        logits_RV: contiguous, in one of `DTYPES`; the gradient is rounded to it.
        batch: without draws.
    """
    targets_R = batch.targets_N
    # A head of the whole vocabulary is no selection: everything is head.
    top_k = plan.top_k if plan.top_k is not None and plan.top_k < logits_RV.shape[1] else None
    sums, maxima_RB = _sum_rows(logits_RV, targets_R, plan.logit_softcap, wants_maxima=top_k is not None)
    head = None
    if top_k is not None and maxima_RB is not None:
        head = _select_head(logits_RV, targets_R, sums, maxima_RB, top_k, plan.logit_softcap)
    row_sums = _row_sums(sums, head, plan)
    row = row_sums.statistics()
    terms = plan.terms_with_z_loss(row)
    metrics = None
    if plan.metrics_top_k is not None:
        # The target is in the head where fewer than k logits are larger.
        is_head_R = (sums["target_rank"] <= plan.metrics_top_k) & (sums["target_logit"] > -torch.inf)
        size_R = sums["num_finite"] if head is None else head["size"]
        metrics = token_metrics(row, row_sums, is_head_R, size_R, sums["target_rank"])
    if gradient_scale_R is not None:
        if plan.needs.top_k is None:  # the head was for the metrics alone
            head = None
        factor_R = gradient_scale_R / row_sums.total
        _write_gradient_(
            logits_RV, targets_R, sums, head, terms, factor_R, gradient_scale_R, plan.logit_softcap
        )
    return RowResult(loss=terms.loss, metrics=metrics)


def _row_sums(sums: _Columns, head: _Columns | None, plan: RowPlan) -> RowSums:
    target_R = sums["target_logit"] - sums["reference"]
    wants_mean = plan.needs.mean_log_prob
    return RowSums(
        max=sums["reference"],
        target=target_R,
        target_mass=target_R.exp(),
        other_mass=sums["other_mass"],
        other_weighted=sums["other_weighted"] if plan.needs_all_nats else None,
        head_mass=None if head is None else head["mass"],
        head_weighted=head["weighted"] if head is not None and plan.needs_head_nats else None,
        finite_mean=sums["finite_sum"] / sums["num_finite"] if wants_mean else None,
        num_finite=sums["num_finite"] if wants_mean else None,
    )


class _Columns:
    """Numbers [R, C] that a kernel wrote, one named column for each."""

    def __init__(self, names: tuple[str, ...], like: Tensor) -> None:
        self.names = names
        self.values_RC = like.new_empty((like.shape[0], len(names)), dtype=torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        return self.values_RC[:, self.names.index(name)]


def _sum_rows(
    logits_RV: Tensor, targets_R: Tensor, softcap: float | None, *, wants_maxima: bool
) -> tuple[_Columns, Tensor | None]:
    """Sums of each row and, if wanted, the maxima [R, B] of its blocks, in one read."""
    num_rows, num_columns = logits_RV.shape
    num_blocks = triton.cdiv(num_columns, BLOCK_COLUMNS)
    sums = _Columns(kernels.SUMS, logits_RV)
    maxima_RB = logits_RV.new_empty((num_rows, num_blocks)) if wants_maxima else None
    with _device_of(logits_RV):
        kernels.sum_rows[(num_rows,)](
            logits_RV,
            targets_R,
            sums.values_RC,
            logits_RV if maxima_RB is None else maxima_RB,
            softcap or 1.0,
            NUM_COLUMNS=num_columns,
            NUM_BLOCKS=num_blocks,
            HAS_SOFTCAP=softcap is not None,
            HAS_MAXIMA=wants_maxima,
            BLOCKS=PASS_BLOCKS,
            COLUMNS=BLOCK_COLUMNS,
            num_warps=PASS_WARPS,
        )
    return sums, maxima_RB


def _select_head(
    logits_RV: Tensor,
    targets_R: Tensor,
    sums: _Columns,
    maxima_RB: Tensor,
    top_k: int,
    softcap: float | None,
) -> _Columns:
    """Threshold and sums of each row's head: its `top_k` largest finite logits and what ties with the last."""
    num_rows, num_blocks = maxima_RB.shape
    selected_RB = torch.empty_like(maxima_RB, dtype=torch.int32)
    num_selected_R, lowest_key_R = selected_RB.new_empty((2, num_rows))
    head = _Columns(kernels.HEAD_SUMS, logits_RV)
    with _device_of(logits_RV):
        kernels.select_blocks[(num_rows,)](
            maxima_RB,
            sums.values_RC,
            selected_RB,
            num_selected_R,
            lowest_key_R,
            top_k,
            NUM_BLOCKS=num_blocks,
            SHIFT=SHIFTS[logits_RV.dtype],
            MAXIMA=SEARCH_MAXIMA,
            num_warps=SEARCH_WARPS,
        )
        kernels.select_head[(num_rows,)](
            logits_RV,
            targets_R,
            sums.values_RC,
            selected_RB,
            num_selected_R,
            lowest_key_R,
            head.values_RC,
            top_k,
            softcap or 1.0,
            NUM_COLUMNS=logits_RV.shape[1],
            NUM_BLOCKS=num_blocks,
            HAS_SOFTCAP=softcap is not None,
            SHIFT=SHIFTS[logits_RV.dtype],
            BLOCKS=SEARCH_BLOCKS,
            COLUMNS=BLOCK_COLUMNS,
            num_warps=SEARCH_WARPS,
        )
    return head


def _write_gradient_(
    logits_RV: Tensor,
    targets_R: Tensor,
    sums: _Columns,
    head: _Columns | None,
    terms: RowTerms,
    factor_R: Tensor,
    gradient_scale_R: Tensor,
    softcap: float | None,
) -> None:
    """Replace the logits by the gradient, in one read and one write; see `RowTerms` for its parts.

    Args:
        head: None where head and tail have one factor.
        factor_R: `gradient_scale_R` over the sum of masses.
    """
    num_rows, num_columns = logits_RV.shape
    columns = PASS_BLOCKS * BLOCK_COLUMNS
    head_factor_R = terms.head_scale * factor_R
    shift_R = None if terms.shift is None else terms.shift * gradient_scale_R
    with _device_of(logits_RV):
        kernels.write_gradient[(num_rows, triton.cdiv(num_columns, columns))](
            logits_RV,
            targets_R,
            sums.values_RC,
            sums.values_RC if head is None else head.values_RC,
            head_factor_R,
            head_factor_R if head is None else terms.tail_scale * factor_R,
            terms.target_gradient * gradient_scale_R,
            head_factor_R if shift_R is None else shift_R,
            softcap or 1.0,
            NUM_COLUMNS=num_columns,
            HAS_SOFTCAP=softcap is not None,
            HAS_HEAD=head is not None,
            HAS_SHIFT=shift_R is not None,
            COLUMNS=columns,
            num_warps=PASS_WARPS,
        )


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
