"""Shapes: the paper's table, what goes together, and the counts against real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3ForCausalLM

from rlprior.models.causal_lm import qwen3_config
from rlprior.models.presets import (
    PRESETS,
    ModelConfig,
    Shape,
    num_parameters,
    training_flops_per_token,
)


def build(shape: Shape, vocab_size: int, device: str, attention: str = "sdpa") -> Any:
    with torch.device(device):
        return Qwen3ForCausalLM(qwen3_config(shape, vocab_size, attn_implementation=attention))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_counted_as_the_real_model_has_them(preset: str, tied: bool) -> None:
    shape = ModelConfig(preset=preset, tied_embeddings=tied).shape
    model = build(shape, 1000, "meta")  # shapes without memory
    assert num_parameters(shape, 1000) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("preset", "tied", "untied"), [("1b", 1.05e9, 1.28e9), ("4b", 4.02e9, 4.41e9)])
def test_the_papers_models_have_the_size_that_their_names_say(
    preset: str, tied: float, untied: float
) -> None:
    # three digits: the precision in which the sizes are quoted
    for is_tied, expected in ((True, tied), (False, untied)):
        shape = ModelConfig(preset=preset, tied_embeddings=is_tied).shape
        assert num_parameters(shape, 151_936) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [64, 256])
def test_training_flops_are_those_of_the_real_model(length: int, tied: bool) -> None:
    """Counted by PyTorch on a forward and backward pass, whose attention products cover the whole square of positions.

    Ours counts the half that causal attention needs, so attention's share is added once more. What then still differs are the
    parameters of norms, which multiply but are no matrix product: 0.2% of the tiny preset's.
    """
    shape = ModelConfig(tied_embeddings=tied).shape
    model = build(shape, 256, "cpu", attention="eager")
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
        ({"preset": "huge"}, "preset = 'huge' is unknown; known: tiny, 20m"),
        ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
        ({"head_dim": -2}, "head_dim must be at least 1, not -2"),
        ({"num_heads": 3}, "num_heads = 3 must be a multiple of num_key_value_heads = 2"),
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
