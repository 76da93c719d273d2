"""Arguments of the losses, found to fit each other, and flattened.

Shape suffixes: N flattened positions, V vocabulary, D width, S draws.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlprior.objectives.batch import TokenBatch, statistics_dtype
from rlprior.objectives.parallel import ShardColumns, VocabularyShard
from rlprior.objectives.registry import IMPLEMENTATIONS
from rlprior.objectives.settings import Objective, SampledReward, is_number

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def take_whole(name: str, tensor: Tensor) -> Tensor:
    """What every process holds of a tensor that may be a `DTensor`, all of it.

    Raises:
        ValueError: the tensor is split.
    """
    split = _as_dtensor(tensor)
    if split is None:
        return tensor
    if not all(placement.is_replicate() for placement in split.placements):
        raise ValueError(
            f"{name} is a DTensor with placements {split.placements}; redistribute it to Replicate() first, or, for logits "
            "or weight split over the vocabulary, pass shard=VocabularyShard(mesh.get_group())"
        )
    return split.to_local()


def take_part(name: str, tensor: Tensor, shard: VocabularyShard | None, dim: int) -> Tensor:
    """What this process holds of a tensor that may be a `DTensor` split along `dim`, the vocabulary.

    Raises:
        ValueError: no shard, another split, or a split over other processes than the shard's.
    """
    split = _as_dtensor(tensor)
    if split is None:
        return tensor
    if shard is None:
        raise ValueError(
            f"{name} is a DTensor: with FSDP, call the loss inside the forward of the module that holds the weight; "
            "with tensor parallelism, pass shard=VocabularyShard(mesh.get_group())"
        )
    if [placement.is_shard(dim) for placement in split.placements] != [True]:
        raise ValueError(
            f"{name} must be sharded along its vocabulary alone, [Shard({dim})], got {split.placements}"
        )
    from torch.distributed import get_process_group_ranks

    own_ranks = [int(rank) for rank in split.device_mesh.mesh.flatten()]
    ranks = get_process_group_ranks(shard.group)
    if own_ranks != ranks:
        raise ValueError(
            f"{name} is sharded over the ranks {own_ranks} and the shard's group has {ranks}; "
            f"pass shard=VocabularyShard({name}.device_mesh.get_group())"
        )
    return split.to_local()


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    if not type(tensor).__module__.startswith("torch.distributed"):  # which is slow to import
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def require_logits(logits: Tensor, shard: VocabularyShard | None) -> None:
    """Logits [..., V]; the part of one process may be empty."""
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim == 0 or (logits.shape[-1] == 0 and shard is None):
        raise ValueError(f"logits must be [..., V] with V of at least 1, got shape {tuple(logits.shape)}")


def require_linear(hidden: Tensor, weight: Tensor, shard: VocabularyShard | None) -> torch.dtype:
    """Dtype of the logits of hidden [..., D] and weight [V, D]; the part of one process may be empty."""
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
    fits = weight.ndim == 2 and hidden.ndim > 0 and hidden.shape[-1] == weight.shape[1] > 0
    if not fits or (weight.shape[0] == 0 and shard is None):
        raise ValueError(
            "hidden must be [..., D] and weight [V, D] with the same D, and D and V of at least 1, "
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


def require_reduction(reduction: str) -> str:
    """ "mean", "sum" or "none"."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return reduction


def require_implementation(implementation: str, shard: VocabularyShard | None) -> None:
    """One that exists, and that takes a shard if there is one."""
    known = ("auto", *IMPLEMENTATIONS) if shard is None else ("auto", "chunked")
    if implementation not in known:
        where = "" if shard is None else " with a shard"
        raise ValueError(f"implementation must be one of {known}{where}, got {implementation!r}")


def require_options(
    logit_softcap: float | None, z_loss: float, metrics_top_k: int | None, chunk_rows: int | None = None
) -> None:
    """Numbers in their ranges."""
    if logit_softcap is not None and not (is_number(logit_softcap) and 0 < logit_softcap < math.inf):
        raise ValueError(f"logit_softcap must be None or a finite number above 0, got {logit_softcap!r}")
    if not (is_number(z_loss) and 0 <= z_loss < math.inf):
        raise ValueError(f"z_loss must be a finite number of at least 0, got {z_loss!r}")
    for name, value in (("metrics_top_k", metrics_top_k), ("chunk_rows", chunk_rows)):
        if value is not None and not (is_number(value) and isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} must be None or an integer of at least 1, got {value!r}")


def flatten_batch(
    inputs: Tensor,
    targets: Tensor,
    objective: Objective,
    token_weights: Tensor | None,
    ignore_index: int,
    generator: torch.Generator | None,
    compute_dtype: torch.dtype,
) -> TokenBatch:
    """Batch of `inputs` [..., V or D]; its targets may still be outside the vocabulary."""
    targets = take_whole("targets", targets)
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
    return TokenBatch(
        targets_N=targets_N,
        weights_N=_flatten_weights(token_weights, targets, statistics_dtype(compute_dtype)),
        uniforms_NS=draw_uniforms(objective, targets_N, generator),
        kept=None if bool(is_kept_N.all()) else is_kept_N.nonzero()[:, 0],
    )


def locate_columns(
    shard: VocabularyShard | None,
    num_columns: int,
    batch: TokenBatch,
    objective: Objective,
    *,
    wants_hidden: bool,
) -> ShardColumns | None:
    """Where the columns of this process lie in the vocabulary; None where they are all of it."""
    if shard is None:
        return None
    if isinstance(objective, SampledReward):
        raise ValueError("SampledReward draws from the whole vocabulary; it is not available with a shard")
    return shard.locate(num_columns, batch, wants_hidden=wants_hidden)


def require_tokens(batch: TokenBatch, vocab_size: int, ignore_index: int) -> None:
    """Targets inside the vocabulary, but for those that are ignored."""
    kept_N = batch.targets_N[batch.positions(0, batch.num_targets)]
    outside_N = (kept_N < 0) | (kept_N >= vocab_size)
    if bool(outside_N.any()):
        first = int(kept_N[outside_N][0])
        raise ValueError(
            f"targets must be in [0, {vocab_size}) or {ignore_index} (ignore_index), got {first}"
        )


def _flatten_weights(token_weights: Tensor | None, targets: Tensor, dtype: torch.dtype) -> Tensor | None:
    if token_weights is None:
        return None
    token_weights = take_whole("token_weights", token_weights)
    if token_weights.shape != targets.shape or token_weights.device != targets.device:
        raise ValueError(
            f"token_weights must be shaped like targets, {tuple(targets.shape)}, and on {targets.device}, "
            f"got {tuple(token_weights.shape)} on {token_weights.device}"
        )
    if token_weights.is_complex() or token_weights.requires_grad:
        raise ValueError("token_weights must be real constants; call .detach() on weights that require grad")
    return token_weights.reshape(-1).to(dtype)


def draw_uniforms(
    objective: Objective, targets_N: Tensor, generator: torch.Generator | None
) -> Tensor | None:
    """Numbers that decide the draws, one row for each position, ignored or not, so that masking changes no other draw."""
    if not isinstance(objective, SampledReward):
        return None
    if generator is None:
        generator = torch.Generator().manual_seed(objective.seed)
    shape = (targets_N.numel(), objective.num_samples)
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=generator.device).to(
        targets_N.device
    )
