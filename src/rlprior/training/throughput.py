"""Model FLOPs utilisation: what a model needs a token, and what a device could give at best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Peak:
    """FLOP/s of dense matrix products, as the maker's datasheet states them (half of a figure "with sparsity").

    Attributes:
        name: part of the name that torch gives the device.
        bfloat16: of the matrix units.
        float32: without TF32, which torch does not use unless told to.
    """

    name: str
    bfloat16: float
    float32: float


PEAKS: dict[str, Peak] = {
    "a100": Peak("A100", 312e12, 19.5e12),
    "h100-pcie": Peak("H100 PCIe", 756e12, 51e12),
    "h100-nvl": Peak("H100 NVL", 835.5e12, 60e12),
    "h100": Peak("H100 80GB HBM3", 989.4e12, 67e12),
    "h200-nvl": Peak("H200 NVL", 835.5e12, 60e12),
    "h200": Peak("H200", 989.4e12, 67e12),
    "b200": Peak("B200", 2250e12, 75e12),
    "l40s": Peak("L40S", 362e12, 91.6e12),
    "mi300x": Peak("MI300X", 1307.4e12, 163.4e12),
}
"""Devices by the name that `rlprior plan --device` takes; of several whose part fits a name, the first holds."""


def peak_flops_per_second(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by the name that torch gives it; None where it is not known.

    >>> peak_flops_per_second("NVIDIA A100-SXM4-80GB"), peak_flops_per_second("AMD EPYC")
    (312000000000000.0, None)
    """
    if "MIG" in device_name:  # a slice of the device, of a size that its name gives in another unit
        return None
    return next((peak.bfloat16 for peak in PEAKS.values() if peak.name in device_name), None)


def model_flops_per_token(model: Any, sequence_length: int) -> float | None:
    """FLOPs of forward and backward for one token of any Hugging Face causal model: 6 N + 6 L H d T.

    N counts the entries of the matrices that one token is multiplied with: the head but not the embedding's look-up, and of stacked
    experts the share that is chosen. Attention reads T/2 keys on average, in two products. What recomputation adds is not counted.

    Args:
        model: whole or sharded; a mixture has its experts stacked, [E, ...], as transformers has from version 5.
        sequence_length: T.

    Returns:
        None where the config lacks the number of layers, heads or chosen experts.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, with causal attention counted once; `rlprior.models.presets` counts the same from
    the shape alone, norms included.
    """
    config = model.config
    num_layers, num_heads = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads")
    )
    if not num_layers or not num_heads:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    only_looked_up = embeddings - {id(model.get_output_embeddings().weight)}
    matrix = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in only_looked_up:
            continue
        share = 1.0
        if ".experts." in name:
            chosen = getattr(config, "num_experts_per_tok", None)
            if not chosen or parameter.ndim != 3:
                return None
            share = chosen / parameter.shape[0]
        matrix += share * parameter.numel()
    return 6.0 * matrix + 6.0 * num_layers * num_heads * head_dim * sequence_length
