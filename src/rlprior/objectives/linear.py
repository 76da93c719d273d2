"""The public losses: one on logits, one on hidden states and the output weight.

Shape suffixes: N flattened positions, V vocabulary, D width, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from rlprior.objectives import chunked, reference
from rlprior.objectives.batch import TokenBatch, TokenMetrics
from rlprior.objectives.chunked import LossRequest, statistics_dtype
from rlprior.objectives.closed_form import RowPlan
from rlprior.objectives.parallel import ShardColumns, VocabularyShard
from rlprior.objectives.registry import IMPLEMENTATIONS, find_entry, find_kernels
from rlprior.objectives.settings import Objective, SampledReward

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
    _require_logits(logits)
    columns = _locate(shard, logits.shape[-1], logits.device, shaping)
    vocabulary = logits.shape[-1] if columns is None else columns.vocab_size
    batch = _flatten(
        logits, vocabulary, targets, shaping, token_weights, ignore_index, generator, logits.dtype
    )
    request = LossRequest(
        batch=batch,
        plan=_plan(shaping, metrics_top_k, return_metrics, logit_softcap, z_loss),
        summed=_require_reduction(reduction) != "none",
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
        implementation: "chunked" keeps the logits of some hundred or thousand positions at a time; "triton" is the same
            with kernels for NVIDIA GPUs, which no GPU has run yet; "reference" holds all logits and differentiates by
            autograd; "auto" is "chunked".
        chunk_rows: positions whose logits are held at a time, at least 1; None chooses by device and vocabulary.
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
    _require_implementation(implementation, shard)
    weight = _local_part(weight, shard)
    compute_dtype = _require_linear(hidden, weight)
    columns = _locate(shard, weight.shape[0], weight.device, shaping)
    vocabulary = weight.shape[0] if columns is None else columns.vocab_size
    batch = _flatten(
        hidden, vocabulary, targets, shaping, token_weights, ignore_index, generator, compute_dtype
    )
    request = LossRequest(
        batch=batch,
        plan=_plan(shaping, metrics_top_k, return_metrics, logit_softcap, z_loss),
        summed=_require_reduction(reduction) != "none",
        compute_dtype=compute_dtype,
        chunk_rows=_require_chunk_rows(chunk_rows),
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
    if logit_softcap is not None and not 0 < logit_softcap < math.inf:
        raise ValueError(f"logit_softcap must be None or a finite number above 0, got {logit_softcap!r}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be a finite number of at least 0, got {z_loss!r}")
    own_top_k: int | None = getattr(objective, "top_k", None)
    if metrics_top_k is not None:
        if metrics_top_k < 1:
            raise ValueError(f"metrics_top_k must be an integer of at least 1, got {metrics_top_k!r}")
        if own_top_k not in (None, metrics_top_k):
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


def _local_part(weight: Tensor, shard: VocabularyShard | None) -> Tensor:
    """The rows that this process holds of a weight that may be a `DTensor`."""
    if not type(weight).__module__.startswith("torch.distributed"):
        return weight
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(weight, DTensor):
        return weight
    if shard is None:
        raise ValueError(
            "weight is a DTensor: with FSDP, call the loss inside the forward of the module that holds the weight; "
            "with tensor parallelism, pass shard=VocabularyShard(mesh.get_group())"
        )
    if tuple(weight.placements) != (Shard(0),):
        raise ValueError(f"weight must be sharded along its rows alone, [Shard(0)], got {weight.placements}")
    return weight.to_local()


def _locate(
    shard: VocabularyShard | None, num_columns: int, device: torch.device, objective: Objective
) -> ShardColumns | None:
    if shard is None:
        return None
    if isinstance(objective, SampledReward):
        raise ValueError("SampledReward draws from the whole vocabulary; it is not available with a shard")
    return shard.locate(num_columns, device)


def _require_logits(logits: Tensor) -> None:
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V of at least 1, got shape {tuple(logits.shape)}")


def _require_linear(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the logits, after the inputs were found to fit each other."""
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            "hidden must be [..., D] and weight [V, D] with the same D and V of at least 1, "
            f"got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.device != weight.device:
        raise ValueError(f"hidden and weight must be on one device, got {hidden.device} and {weight.device}")
    device_type = hidden.device.type
    # As autocast itself does, leave float64 alone.
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    return hidden.dtype


def _require_reduction(reduction: str) -> str:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return reduction


def _require_implementation(implementation: str, shard: VocabularyShard | None) -> None:
    known = ("auto", *IMPLEMENTATIONS) if shard is None else ("auto", "chunked")
    if implementation not in known:
        where = "" if shard is None else " with a shard"
        raise ValueError(f"implementation must be one of {known}{where}, got {implementation!r}")


def _require_chunk_rows(chunk_rows: int | None) -> int | None:
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be None or an integer of at least 1, got {chunk_rows!r}")
    return chunk_rows


def _flatten(
    inputs: Tensor,
    vocabulary: int,
    targets: Tensor,
    objective: Objective,
    token_weights: Tensor | None,
    ignore_index: int,
    generator: torch.Generator | None,
    compute_dtype: torch.dtype,
) -> TokenBatch:
    """Batch of `inputs` [..., V or D], checked."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if targets.shape != inputs.shape[:-1]:
        raise ValueError(
            f"targets must be shaped like the inputs without their last dimension, {tuple(inputs.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    if targets.device != inputs.device:
        raise ValueError(f"targets must be on {inputs.device}, got {targets.device}")
    targets_N = targets.reshape(-1).to(torch.int64).contiguous()
    is_kept_N = targets_N != ignore_index
    outside_N = is_kept_N & ((targets_N < 0) | (targets_N >= vocabulary))
    if bool(outside_N.any()):
        first = int(targets_N[outside_N][0])
        raise ValueError(
            f"targets must be in [0, {vocabulary}) or {ignore_index} (ignore_index), got {first}"
        )
    return TokenBatch(
        targets_N=targets_N,
        weights_N=_flatten_weights(token_weights, targets, statistics_dtype(compute_dtype)),
        uniforms_NS=_uniforms(objective, targets_N, generator),
        kept=None if bool(is_kept_N.all()) else is_kept_N.nonzero()[:, 0],
    )


def _flatten_weights(token_weights: Tensor | None, targets: Tensor, dtype: torch.dtype) -> Tensor | None:
    if token_weights is None:
        return None
    if token_weights.shape != targets.shape or token_weights.device != targets.device:
        raise ValueError(
            f"token_weights must be shaped like targets, {tuple(targets.shape)}, and on {targets.device}, "
            f"got {tuple(token_weights.shape)} on {token_weights.device}"
        )
    if token_weights.is_complex() or token_weights.requires_grad:
        raise ValueError("token_weights must be real constants; call .detach() on weights that require grad")
    return token_weights.reshape(-1).to(dtype)


def _uniforms(objective: Objective, targets_N: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Numbers that decide the draws, one row for each position, ignored or not, so that masking changes no other draw."""
    if not isinstance(objective, SampledReward):
        return None
    if generator is None:
        generator = torch.Generator().manual_seed(objective.seed)
    shape = (targets_N.numel(), objective.num_samples)
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=generator.device).to(
        targets_N.device
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
