"""The public losses: one on logits, one on hidden states and the output weight.

Shape suffixes: N flattened positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from rlprior.objectives import chunked, reference
from rlprior.objectives.batch import TokenBatch, TokenMetrics
from rlprior.objectives.chunked import LossRequest
from rlprior.objectives.closed_form import RowPlan
from rlprior.objectives.inputs import (
    flatten_batch,
    locate_columns,
    require_implementation,
    require_linear,
    require_logits,
    require_options,
    require_reduction,
    require_tokens,
    take_part,
    take_whole,
)
from rlprior.objectives.parallel import VocabularyShard
from rlprior.objectives.registry import find_entry, find_kernels
from rlprior.objectives.settings import Objective

METRICS_TOP_K = 100
"""Head size of the metrics for objectives that have no `top_k` of their own."""

Reduction = Literal["mean", "sum", "none"]
Implementation = Literal["auto", "chunked", "triton", "reference"]

F = TypeVar("F", bound=Callable[..., object])


def outside_compiled_graphs(function: F) -> F:
    """The function, called as it is from a compiled model: it writes gradients in place, chunk by chunk."""
    return cast(F, torch.compiler.disable(function))  # pyright: ignore[reportUnknownMemberType]


@overload
def shaped_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    shaping: Objective,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    *,
    generator: torch.Generator | None = None,
    metrics_top_k: int | None = None,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    return_metrics: Literal[False] = False,
) -> Tensor: ...


@overload
def shaped_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    shaping: Objective,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    *,
    generator: torch.Generator | None = None,
    metrics_top_k: int | None = None,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    return_metrics: Literal[True],
) -> tuple[Tensor, TokenMetrics]: ...


@outside_compiled_graphs
def shaped_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    shaping: Objective,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    *,
    generator: torch.Generator | None = None,
    metrics_top_k: int | None = None,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """Loss of next-token logits under any objective; nothing is shifted here.

    Args:
        logits: [..., V], floating point.
        targets: [...], integers in [0, V) or `ignore_index`.
        shaping: settings of any objective, such as `RewardShaping(beta=-0.25)` or `CrossEntropy()`.
        token_weights: [...], constant factor of each position's loss and gradient; None is 1.
        ignore_index: target of positions that count for nothing, whatever their logits hold.
        reduction: "mean" divides the sum by the number of targets that are not ignored (token weights do not
            change it), and is 0 where all are; "sum"; or "none", which is 0 at ignored positions.
        generator: source of the draws of `SampledReward`, in place of its seed; other objectives draw nothing.
        metrics_top_k: head size of the metrics; None is the objective's own `top_k`, or `METRICS_TOP_K`.
        logit_softcap: c > 0 where the model's logits are `c tanh(z / c)`, as in Gemma 2; -inf stays -inf.
        shard: where `logits` (or `weight`) hold this process's part of a vocabulary that a group of processes shares, as
            in tensor parallelism. All of them pass the same targets, weights and options, and get the same loss.
        z_loss: coefficient, at least 0, of `(log sum_j exp(z_j))^2`, added to each position's loss (PaLM takes 1e-4).
        return_metrics: also return `TokenMetrics`, shaped like `targets`.

    Returns:
        The loss, float64 for float64 logits and float32 otherwise: a scalar, or [...] for "none". With
        `return_metrics`, the loss and the metrics. Values of different objectives are not comparable; the metrics are.

    Raises:
        ValueError: shapes, dtypes, devices, targets or options that do not fit.

    Differs: the gradient is the closed form of the objective's stop-gradient surrogate; it cannot be
    differentiated again, and double backward raises RuntimeError.

    >>> from rlprior.objectives import RewardShaping
    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> shaped_cross_entropy(logits, torch.tensor([0, 2]), RewardShaping(beta=-0.25), reduction="none")
    tensor([0.4634, 1.2352])
    """
    require_options(logit_softcap, z_loss, metrics_top_k)
    logits = (
        take_whole("logits", logits) if shard is None else take_part("logits", logits, shard, logits.ndim - 1)
    )
    require_logits(logits, shard)
    batch = flatten_batch(logits, targets, shaping, token_weights, ignore_index, generator, logits.dtype)
    columns = locate_columns(shard, logits.shape[-1], batch, shaping, wants_hidden=False)
    require_tokens(batch, logits.shape[-1] if columns is None else columns.vocab_size, ignore_index)
    request = LossRequest(
        batch=batch,
        plan=_plan(shaping, metrics_top_k, return_metrics, logit_softcap, z_loss),
        summed=require_reduction(reduction) != "none",
        compute_dtype=logits.dtype,
        shard=columns,
    )
    loss, metrics = chunked.logits_loss(logits.reshape(-1, logits.shape[-1]), request)
    return _present(loss, metrics, targets, batch, reduction)


@overload
def linear_shaped_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shaping: Objective,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    implementation: Implementation = "auto",
    *,
    generator: torch.Generator | None = None,
    metrics_top_k: int | None = None,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    chunk_rows: int | None = None,
    return_metrics: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_shaped_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shaping: Objective,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    implementation: Implementation = "auto",
    *,
    generator: torch.Generator | None = None,
    metrics_top_k: int | None = None,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    chunk_rows: int | None = None,
    return_metrics: Literal[True],
) -> tuple[Tensor, TokenMetrics]: ...


@outside_compiled_graphs
def linear_shaped_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shaping: Objective,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    implementation: Implementation = "auto",
    *,
    generator: torch.Generator | None = None,
    metrics_top_k: int | None = None,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    chunk_rows: int | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """Loss of the logits `hidden @ weight.T` under any objective, without holding all of them at once.

    Args:
        hidden: [..., D], floating point.
        weight: [V, D], in the dtype of `hidden` unless autocast is on; an embedding tied to the input will do.
        implementation: "chunked" keeps the logits of `chunk_rows` positions at a time; "triton" is the same
            with kernels for NVIDIA GPUs, which no GPU has run yet; "reference" holds all logits and differentiates by
            autograd; "auto" is "chunked".
        chunk_rows: positions whose logits are held at a time, at least 1; None chooses by device, V, D and memory: 256 or more
            on a CPU, 2048 to 4096 on a GPU.
        targets, shaping, token_weights, ignore_index, reduction, generator, metrics_top_k, logit_softcap, z_loss,
            shard, return_metrics: as in `shaped_cross_entropy`.

    Returns:
        As `shaped_cross_entropy`. Logits are computed in the dtype of `hidden` (or autocast's); "mean" and "sum"
        form the gradients along with the loss, "none" computes the logits again when it is differentiated.

    Raises:
        ValueError: shapes, dtypes, devices, targets or options that do not fit.

    >>> from rlprior.objectives import CrossEntropy
    >>> hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    >>> loss = linear_shaped_cross_entropy(hidden, weight, torch.tensor([0, -100]), CrossEntropy())
    >>> loss.backward()
    >>> hidden.grad
    tensor([[-0.4248,  0.0000],
            [ 0.0000,  0.0000]])
    """
    require_implementation(implementation, shard)
    require_options(logit_softcap, z_loss, metrics_top_k, chunk_rows)
    hidden, weight = take_whole("hidden", hidden), take_part("weight", weight, shard, 0)
    compute_dtype = require_linear(hidden, weight, shard)
    batch = flatten_batch(hidden, targets, shaping, token_weights, ignore_index, generator, compute_dtype)
    wants_hidden = torch.is_grad_enabled() and hidden.requires_grad
    columns = locate_columns(shard, weight.shape[0], batch, shaping, wants_hidden=wants_hidden)
    require_tokens(batch, weight.shape[0] if columns is None else columns.vocab_size, ignore_index)
    request = LossRequest(
        batch=batch,
        plan=_plan(shaping, metrics_top_k, return_metrics, logit_softcap, z_loss),
        summed=require_reduction(reduction) != "none",
        compute_dtype=compute_dtype,
        chunk_rows=chunk_rows,
        shard=columns,
        kernels=find_kernels(implementation, shaping, compute_dtype, hidden.device),
    )
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    if implementation == "reference":
        loss, metrics = reference.linear_loss(
            hidden_ND, weight, partial(find_entry(shaping).reference, shaping), request
        )
    else:
        loss, metrics = chunked.linear_loss(hidden_ND, weight, request)
    return _present(loss, metrics, targets, batch, reduction)


def _plan(
    objective: Objective,
    metrics_top_k: int | None,
    wants_metrics: bool,
    logit_softcap: float | None,
    z_loss: float,
) -> RowPlan:
    entry = find_entry(objective)
    own_top_k: int | None = getattr(objective, "top_k", None)
    if metrics_top_k is not None and own_top_k not in (None, metrics_top_k):
        raise ValueError(
            f"metrics_top_k must be None or the objective's own {own_top_k}, got {metrics_top_k}"
        )
    return RowPlan(
        terms=partial(entry.terms, objective),
        needs=entry.needs(objective),
        metrics_top_k=(own_top_k or metrics_top_k or METRICS_TOP_K) if wants_metrics else None,
        logit_softcap=logit_softcap,
        z_loss=z_loss,
    )


def _present(
    loss: Tensor, metrics: TokenMetrics | None, targets: Tensor, batch: TokenBatch, reduction: str
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """Loss reduced and shaped for the caller, with the metrics if there are any."""
    if reduction == "mean":
        loss = loss / max(batch.num_targets, 1)
    elif reduction == "none":
        loss = loss.reshape(targets.shape)
    return loss if metrics is None else (loss, metrics.reshape(targets.shape))
