"""Models of a few thousand weights, documents of unequal length for them, and gradients to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Dots1Config,
    Dots1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rlprior.objectives import Objective, RewardShaping, shaped_cross_entropy

VOCABULARY = 53
SHAPING = RewardShaping(beta=-0.25, head_reward=0.1, tail_reward=-0.1, top_k=5)

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform predictions
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,  # a cache would hide where packed documents end
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    # a cap low enough to bend the logits
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 1.5}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 8, "final_logit_softcapping": 1.5}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            **EXPERTS,
            "head_dim": 8,
            "num_experts": 4,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.5,
        },
    ),
    "dots1": (
        Dots1ForCausalLM,
        Dots1Config,
        {
            **EXPERTS,
            "head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}

# (token ids, length of the prompt, which is not trained on): of unequal length and number of targets
DOCUMENTS: list[tuple[list[int], int]] = [
    ([7, 3, 41, 9, 12, 30, 5, 8, 21, 2], 3),
    ([4, 4, 17], 0),
    ([50, 11, 6, 29, 33, 18, 2], 2),
    ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 1),
    ([20, 19, 18, 17, 16, 15, 14, 13, 12], 8),
    ([31, 13, 31, 13, 31], 0),
    ([9, 40, 51, 52, 8, 22, 35, 27, 46, 3, 2], 4),
    ([26, 10], 1),
    ([44, 43, 7, 7, 7, 38, 5, 2], 1),
    ([16, 37, 24, 48, 1, 29], 5),
    ([12, 45, 23, 2], 2),
    ([34, 28, 42, 49, 47, 39, 36, 32, 25, 14, 6, 3], 6),
]


def small_model(family: str = "qwen3") -> Any:
    """The same weights at every call."""
    model_class, config_class, changes = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**SHAPE, **changes)).train()


def examples() -> list[dict[str, list[int]]]:
    """The documents as a dataset, without padding."""
    return [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in DOCUMENTS]


def pad(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One row for each document, padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def matrix(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    )
    return {"input_ids": matrix("input_ids", 0), "labels": matrix("labels", -100), "attention_mask": mask}


def pack(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """All documents in one row; positions start again with each, and no document predicts the next one's first token."""
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in [-100, *row["labels"][1:]]]
    positions = [position for row in rows for position in range(len(row["input_ids"]))]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }


def num_targets(rows: Sequence[dict[str, list[int]]]) -> int:
    """Labels that are predicted: all that are not ignored, but a document's first."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def expected_loss(model: nn.Module, batch: dict[str, Tensor], shaping: Objective, count: int) -> Tensor:
    """Summed loss of the model's own logits over `count`."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    return shaped_cross_entropy(logits, batch["labels"][:, 1:], shaping, reduction="sum") / count


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients, whole, which the model then forgets."""
    found = {
        name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found


def expected_gradients(shaping: Objective = SHAPING, family: str = "qwen3") -> dict[str, Tensor]:
    """Gradients of the mean loss over the targets of all documents, in one batch."""
    model = small_model(family)
    expected_loss(model, pad(examples()), shaping, num_targets(examples())).backward()
    return gradients(model)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for rounding.

    Sums of at most some hundred float32 numbers, taken in another order through a few layers, differ by some hundred
    roundings of 6e-8 of the largest entry. Another normaliser or a lost document differs by more than a hundredth.
    """
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
