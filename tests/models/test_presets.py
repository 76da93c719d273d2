"""Shapes: the paper's table, what goes together, and the counts against real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from rlprior.models.causal_lm import huggingface_config, new_model
from rlprior.models.presets import (
    PRESETS,
    ModelConfig,
    Shape,
    num_active_parameters,
    num_parameters,
    training_flops_per_token,
)

QWEN3_VOCABULARY = 151_936


def build(shape: Shape, vocab_size: int, device: str, attention: str = "sdpa") -> Any:
    with torch.device(device):
        return new_model(huggingface_config(shape, vocab_size, attn_implementation=attention))


# the paper's Table 1, typed from the paper: n_layer, d_model, d_ffn or d_expert, n_head, n_kvhead, E, E_a
TABLE_1 = {
    "1b": (28, 1536, 4608, 16, 4, 0, 0),
    "4b": (36, 2560, 9728, 32, 8, 0, 0),
    "5b-a0.3b": (12, 1024, 320, 32, 4, 384, 12),
    "10b-a0.5b": (16, 1536, 320, 32, 4, 384, 12),
}
# by arithmetic on Table 1, with head dimension 128 and Qwen3's vocabulary: tied, untied, active without embeddings
SIZES = {
    "1b": (1_048_211_968, 1_281_585_664, 814_838_272),
    "4b": (4_022_468_096, 4_411_424_256, 3_633_511_936),
    "5b-a0.3b": (4_803_424_256, 4_959_006_720, 259_551_232),
    "10b-a0.5b": (9_529_054_720, 9_762_428_416, 519_099_904),
}


@pytest.mark.parametrize("preset", TABLE_1)
def test_the_papers_models_are_those_of_its_table(preset: str) -> None:
    shape = PRESETS[preset]
    layers, width, network, heads, key_value_heads, experts, active = TABLE_1[preset]
    assert shape == Shape(
        num_layers=layers,
        hidden_size=width,
        intermediate_size=network,
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=128,
        num_experts=experts,
        num_experts_per_token=active,
        tied_embeddings=True,
    )


@pytest.mark.parametrize("preset", SIZES)
def test_the_papers_models_have_their_exact_size(preset: str) -> None:
    """Counted on the model itself, on the meta device (shapes without memory), and by the formulas."""
    tied, untied, active = SIZES[preset]
    for is_tied, expected in ((True, tied), (False, untied)):
        shape = ModelConfig(preset=preset, tied_embeddings=is_tied).shape
        model = build(shape, QWEN3_VOCABULARY, "meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == expected
        assert num_parameters(shape, QWEN3_VOCABULARY) == expected
        assert num_active_parameters(shape) == counted_active(model, shape) == active


def counted_active(model: Any, shape: Shape) -> int:
    """Parameters outside the embeddings, of the experts' only the share that a token is routed to."""
    total = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            total += parameter.numel() * shape.num_experts_per_token // shape.num_experts
        elif "embed_tokens" not in name and "lm_head" not in name:
            total += parameter.numel()
    return total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_counted_as_the_real_model_has_them(preset: str, tied: bool) -> None:
    shape = ModelConfig(preset=preset, tied_embeddings=tied).shape
    model = build(shape, 1000, "meta")
    assert num_parameters(shape, 1000) == sum(parameter.numel() for parameter in model.parameters())
    assert num_active_parameters(shape) == counted_active(model, shape)
    assert all(parameter.numel() for parameter in model.parameters())


def test_experts_are_computed_as_the_library_computes_them() -> None:
    config = huggingface_config(PRESETS["tiny-moe"], 100)
    assert build(PRESETS["tiny-moe"], 100, "meta").config._experts_implementation == "grouped_mm"
    with torch.device("meta"), pytest.warns(UserWarning, match="zero-element"):
        theirs = transformers.Dots1ForCausalLM(config)
    assert theirs.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("preset", ["20m", "100m", "100m-moe"])
def test_small_presets_have_about_the_size_that_their_names_say(preset: str) -> None:
    """Dense `20m` with a vocabulary of 16384, the others without embeddings, within a tenth."""
    vocab_size = 16_384 if preset == "20m" else 0
    named = float(preset.removesuffix("-moe").removesuffix("m")) * 1e6
    assert num_parameters(PRESETS[preset], vocab_size) == pytest.approx(named, rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [64, 256])
@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_training_flops_are_those_of_the_real_model(preset: str, length: int, tied: bool) -> None:
    """Counted by PyTorch on a forward and backward pass, whose attention products cover the whole square of positions.

    Ours counts the half that causal attention needs, so attention's share is added once more. What then still differs are the
    parameters of norms, which multiply but are no matrix product: 0.2% of the tiny preset's.
    """
    shape = ModelConfig(preset=preset, tied_embeddings=tied).shape
    model = build(shape, 256, "cpu", attention="eager")
    # one product for each expert: the counter does not know the grouped one
    model.set_experts_implementation("eager")
    ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops() / length
    causal_half = 6 * shape.num_layers * shape.num_heads * shape.head_dim * length
    ours = training_flops_per_token(shape, 256, length) + causal_half
    assert ours == pytest.approx(counted, rel=5e-3)
    assert causal_half > 0.02 * counted  # so that dropping it would be seen


def test_replacements_leave_the_rest_of_the_preset() -> None:
    shape = ModelConfig(preset="20m", num_layers=2, tied_embeddings=False).shape
    assert shape == Shape(
        num_layers=2,
        hidden_size=384,
        intermediate_size=1152,
        num_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        tied_embeddings=False,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "preset = 'huge' is unknown; known: tiny, tiny-moe, 20m"),
        ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
        ({"head_dim": -2}, "head_dim must be at least 1, not -2"),
        ({"num_heads": 3}, "num_heads = 3 must be a multiple of num_key_value_heads = 2"),
        ({"num_experts": -1}, "num_experts must be 0 .dense. or at least 2, not -1"),
        (
            {"num_experts": 1, "num_experts_per_token": 1},
            "num_experts must be 0 .dense. or at least 2, not 1",
        ),
        ({"num_experts_per_token": 2}, "num_experts must be 0 .dense. or at least 2, not 0"),
        ({"num_experts": 4}, "num_experts_per_token must lie between 1 and num_experts = 4, not 0"),
        (
            {"preset": "tiny-moe", "num_experts_per_token": 9},
            "num_experts_per_token must lie between 1 and num_experts = 8, not 9",
        ),
        ({"balancing_rate": -1e-3}, "balancing_rate must be 0 or more and finite, not -0.001"),
        ({"balancing_rate": float("inf")}, "balancing_rate must be 0 or more and finite, not inf"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0 and finite, not 0.0"),
        ({"rope_theta": float("nan")}, "rope_theta must be above 0 and finite, not nan"),
        ({"initializer_range": -0.1}, "initializer_range must be above 0 and finite, not -0.1"),
        ({"initializer_range": float("inf")}, "initializer_range must be above 0 and finite, not inf"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)
