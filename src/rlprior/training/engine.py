"""How a model lies on the devices of a run: sharding, precision, recomputation, compilation. What is computed stays the same.

model = build_model(...)                                   # whole, on the CPU, the same in every process
module = prepare_model(model, EngineConfig(), "auto", world)   # on its device, sharded over the world
loss_sum, sums = module(batch, objective)                  # the loss is inside: sharding gathers the head's weight for it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rlprior.config import UsageError
from rlprior.data.packing import PackedBatch, attention_mask
from rlprior.models.causal_lm import autocast, head_weight, packed_hidden_states
from rlprior.models.onednn import is_onednn_faster, multiply_with_onednn
from rlprior.objectives import Objective, linear_shaped_cross_entropy
from rlprior.world import World

Precision = Literal["auto", "float32", "bfloat16"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Speed and memory of a stage. Another setting rounds differently and computes the same.

    Args:
        shard_size: processes that share one copy of the model and its optimizer (FSDP2); left out, all of them. With 8 on 32 GPUs
            each group of 8 holds a copy (HSDP).
        cpu_offload: keep the shards in CPU memory and bring them to the GPU layer by layer. Needs several processes.
        activation_checkpointing: what the backward pass computes again: 'none', 'selective' (all but matrix products and
            attention), or 'full' (whole layers).
        compile: `torch.compile` each layer.
        background_checkpoints: write checkpoints while training goes on; left out, on GPUs.
    """

    shard_size: int | None = None
    cpu_offload: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    background_checkpoints: bool | None = None

    def __post_init__(self) -> None:
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, not {self.shard_size}")
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "compile goes with activation_checkpointing 'none' or 'full': what 'selective' keeps is not seen inside compiled layers"
            )

    def writes_in_background(self, device_type: str) -> bool:
        """Whether checkpoints are written while training goes on."""
        if self.background_checkpoints is None:
            return device_type == "cuda"
        return self.background_checkpoints


class LanguageModelLoss(nn.Module):
    """A Hugging Face causal model and its loss as one module, so that a wrapper sees the head's weight being used."""

    def __init__(self, model: Any, autocast_dtype: torch.dtype | None = None) -> None:
        """Wrap `model`; matrix products are in `autocast_dtype` where one is given."""
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast_dtype

    def forward(
        self,
        batch: PackedBatch,
        objective: Objective,
        *,
        with_metrics: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed objective and, where asked for, summed metrics over the targets that are not ignored."""
        with autocast(batch.input_ids.device, self.autocast_dtype):
            hidden = packed_hidden_states(
                self.model, batch.input_ids, batch.position_ids, attention_mask(batch.document_ids)
            )
            compute_loss = partial(
                linear_shaped_cross_entropy,
                hidden,
                head_weight(self.model),
                batch.targets,
                objective,
                reduction="sum",
                generator=generator,
            )
            if not with_metrics:
                return compute_loss(), {}
            loss, metrics = compute_loss(return_metrics=True)
        sums = {
            "cross_entropy_nats": metrics.cross_entropy,
            "entropy_nats": metrics.entropy,
            "head_mass": metrics.head_mass,
            "target_rank": metrics.target_rank,
        }
        return loss, {name: torch.nansum(value.double()) for name, value in sums.items()}


def resolve_precision(precision: Precision, world: World) -> Literal["float32", "bfloat16"]:
    """What 'auto' is on the world's devices: bfloat16 on GPUs, float32 on CPUs."""
    if precision != "auto":
        return precision
    return "bfloat16" if world.device_type == "cuda" else "float32"


@overload
def prepare_model(
    model: Any, config: EngineConfig, precision: Precision, world: World
) -> LanguageModelLoss: ...


@overload
def prepare_model(
    model: Any, config: EngineConfig, precision: Precision, world: World, wrap: Callable[..., ModuleT]
) -> ModuleT: ...


def prepare_model(
    model: Any,
    config: EngineConfig,
    precision: Precision,
    world: World,
    wrap: Callable[..., nn.Module] = LanguageModelLoss,
) -> nn.Module:
    """The model with its loss, on its device, sharded over the processes of the world.

    Args:
        model: Hugging Face causal model, whole, on the CPU, with the same weights in every process.
        config: what to do with it.
        precision: dtype of the matrix products; under sharding that of the activations between the layers too.
        world: the processes; each calls this.
        wrap: (model, autocast_dtype=None) -> module that has the model as `model`, and uses the head's weight in its forward.

    Raises:
        UsageError: settings that do not fit the world, or a model without a list of layers where one is needed.
    """
    dtype = getattr(torch, resolve_precision(precision, world))
    if world.device_type == "cpu" and dtype == torch.float32 and not config.compile and is_onednn_faster():
        multiply_with_onednn(model)
    # a forward of its own, and not a wrapper, leaves the names of the weights as they are
    if config.compile:
        for layer in _layers(model):
            layer.forward = torch.compile(layer.forward)
    if config.activation_checkpointing != "none":
        options = _recomputation(config.activation_checkpointing)
        for layer in _layers(model):
            layer.forward = partial(checkpoint, layer.forward, **options)
    if world.size > 1:
        module = wrap(model)
        _shard(module, config, world, dtype)
        return module
    if config.shard_size not in (None, 1) or config.cpu_offload:
        raise UsageError(
            "engine.shard_size and engine.cpu_offload need several processes; start them with torchrun"
        )
    return wrap(model.to(world.device), None if dtype == torch.float32 else dtype)


def _layers(model: Any) -> nn.ModuleList:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UsageError(
            f"{type(model).__name__} has no list of layers to shard or compile; train it in one process, uncompiled"
        )
    return layers


def _shard(module: Any, config: EngineConfig, world: World, dtype: torch.dtype) -> None:
    """FSDP2, one unit a layer, and one for the embeddings, the last norm and the head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    shard_size = config.shard_size or world.size
    if world.size % shard_size:
        raise UsageError(f"engine.shard_size = {shard_size} must divide the {world.size} processes")
    if config.cpu_offload and world.device_type == "cpu":
        raise UsageError("engine.cpu_offload needs GPUs; on CPUs the weights are in CPU memory already")
    if shard_size == world.size:
        mesh = init_device_mesh(world.device_type, (world.size,), mesh_dim_names=("shard",))
    else:
        sizes = (world.size // shard_size, shard_size)
        mesh = init_device_mesh(world.device_type, sizes, mesh_dim_names=("replicate", "shard"))
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    }
    for layer in _layers(module.model):
        fully_shard(layer, **options)
    fully_shard(module, **options)


KEPT_BY_SELECTIVE_CHECKPOINTING = (
    torch.ops.aten.mm.default,
    torch.ops.mkldnn._linear_pointwise.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _recomputation(kind: str) -> dict[str, Any]:
    """Options of `torch.utils.checkpoint.checkpoint`."""
    if kind == "full":
        return {"use_reentrant": False}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in KEPT_BY_SELECTIVE_CHECKPOINTING:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, policy)}
