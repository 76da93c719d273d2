"""Export of a mixture of experts to `Qwen3MoeForCausalLM`, where that class can express it."""

from __future__ import annotations

from typing import Any

import torch

from rlprior.config import UsageError

_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts_per_tok",
    "norm_topk_prob",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_ADVICE = "keep the Dots1ForCausalLM folder, which transformers and vLLM read"


def as_qwen3_moe(model: Any) -> Any:
    """The same model as a `Qwen3MoeForCausalLM`, with equal logits.

    Qwen3-MoE chooses experts by their logits alone and weighs them by a softmax; ours are chosen by score and selection bias and
    weighed by sigmoids normalised to 1. The two agree only where no bias is set and each token has a single expert, whose weight is 1
    either way; no linear router turns one into the other otherwise.

    Args:
        model: a mixture of experts as `build_model` makes it.

    Returns:
        A copy of the weights, in the model's dtype.

    Raises:
        UsageError: the model is another one, or Qwen3-MoE would compute something else; the reason is in the message.
    """
    config = model.config
    if config.model_type != "dots1" or config.n_shared_experts or config.first_k_dense_replace:
        raise UsageError(
            f"{config.model_type}: only a Dots1 model with routed experts in every layer is exported"
        )
    weights = dict(model.state_dict())
    for layer in range(config.num_hidden_layers):
        if bool(weights.pop(f"model.layers.{layer}.mlp.gate.e_score_correction_bias").any()):
            raise UsageError(
                f"the selection bias of layer {layer} is not zero and Qwen3-MoE has none: tokens would go to other experts; {_ADVICE}"
            )
    if config.num_experts_per_tok > 1 or not config.norm_topk_prob or config.routed_scaling_factor != 1:
        raise UsageError(
            f"{config.num_experts_per_tok} experts a token: Qwen3-MoE weighs them by the softmax of their logits, this model by their "
            f"sigmoids, and no router makes the two equal; {_ADVICE}"
        )
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    options = {name: getattr(config, name) for name in _SAME_FIELDS}
    with torch.random.fork_rng(devices=[]):  # its own initialisation, overwritten at once, draws numbers
        exported = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=config.n_routed_experts, **options))
    exported.to(model.dtype).load_state_dict(weights)
    return exported.train(model.training)
