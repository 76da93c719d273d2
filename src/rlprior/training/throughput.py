"""Model FLOPs utilisation: what a model needs a token, and what a device could give at best."""

from __future__ import annotations

from typing import Any

from torch import nn

PEAK_BF16_FLOPS: tuple[tuple[str, float, str], ...] = (
    ("A100", 312e12, "NVIDIA A100 datasheet"),
    ("H100 PCIe", 756e12, "NVIDIA H100 PCIe product brief: 1513 with sparsity"),
    ("H100 NVL", 835.5e12, "NVIDIA H100 datasheet: 1671 with sparsity"),
    ("H100 80GB HBM3", 989.5e12, "NVIDIA H100 datasheet, SXM: 1979 with sparsity"),
    ("H200 NVL", 835.5e12, "NVIDIA H200 datasheet: 1671 with sparsity"),
    ("H200", 989.5e12, "NVIDIA H200 datasheet, SXM: 1979 with sparsity"),
    ("B200", 2250e12, "NVIDIA Blackwell datasheet, HGX B200: 4500 with sparsity"),
    ("L40S", 362e12, "NVIDIA L40S datasheet: 733 with sparsity"),
    ("MI300X", 1307.4e12, "AMD Instinct MI300X datasheet"),
)
"""Part of the device's name -> dense bfloat16 FLOP/s of its matrix units, and the source; the first that fits holds."""


def peak_flops_per_second(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by the name that torch gives it; None where it is not known.

    >>> peak_flops_per_second("NVIDIA A100-SXM4-80GB"), peak_flops_per_second("AMD EPYC")
    (312000000000000.0, None)
    """
    if "MIG" in device_name:  # a slice of the device, of a size that its name gives in another unit
        return None
    return next((peak for part, peak, _ in PEAK_BF16_FLOPS if part in device_name), None)


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
