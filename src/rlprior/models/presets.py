"""Model shapes: the first paper's dense models (Table 1) and small ones of the same architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Dimensions of a Qwen3-style decoder.

    Differs: Table 1 gives no head dimension, vocabulary or tying. Head dimension 128 and tied embeddings are our assumption for the
    paper's models; the vocabulary always comes from the tokenizer (Qwen3's own has 151936 entries).
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    tied_embeddings: bool = True


PRESETS: dict[str, Shape] = {
    "tiny": Shape(
        num_layers=3, hidden_size=128, intermediate_size=352, num_heads=4, num_key_value_heads=2, head_dim=32
    ),
    "20m": Shape(
        num_layers=8, hidden_size=384, intermediate_size=1152, num_heads=6, num_key_value_heads=2, head_dim=64
    ),
    "100m": Shape(
        num_layers=16,
        hidden_size=768,
        intermediate_size=2048,
        num_heads=12,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "1b": Shape(num_layers=28, hidden_size=1536, intermediate_size=4608, num_heads=16, num_key_value_heads=4),
    "4b": Shape(num_layers=36, hidden_size=2560, intermediate_size=9728, num_heads=32, num_key_value_heads=8),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A preset, with any of its dimensions replaced.

    Args:
        preset: one of `PRESETS`.
        rope_theta: base of the rotary position embedding in pre-training (1e4 in the paper).
        initializer_range: standard deviation of the normal initialisation of every matrix (0.02, the Qwen3 class's default).
        num_layers, hidden_size, intermediate_size, num_heads, num_key_value_heads, head_dim, tied_embeddings: replace the preset's.

    Raises:
        ValueError: unknown preset, or dimensions that do not go together.
    """

    preset: str = "tiny"
    rope_theta: float = 1e4
    initializer_range: float = 0.02
    num_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tied_embeddings: bool | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset!r} is unknown; known: {', '.join(PRESETS)}")
        for name in ("rope_theta", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        shape = self.shape
        for field in fields(shape):
            if getattr(shape, field.name) < 1 and field.name != "tied_embeddings":
                raise ValueError(f"{field.name} must be at least 1, not {getattr(shape, field.name)}")
        if shape.num_heads % shape.num_key_value_heads:
            raise ValueError(
                f"num_heads = {shape.num_heads} must be a multiple of num_key_value_heads = {shape.num_key_value_heads}"
            )
        if shape.head_dim % 2:
            raise ValueError(f"head_dim = {shape.head_dim} must be even for rotary embeddings")

    @property
    def shape(self) -> Shape:
        """The preset with the replacements."""
        given = {field.name: getattr(self, field.name) for field in fields(Shape)}
        return replace(
            PRESETS[self.preset], **{name: value for name, value in given.items() if value is not None}
        )


def num_parameters(shape: Shape, vocab_size: int) -> int:
    """Parameters of the model, embeddings included (once where they are tied)."""
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_key_value_heads)
    per_layer = (
        attention
        + 3 * shape.hidden_size * shape.intermediate_size
        + 2 * shape.hidden_size
        + 2 * shape.head_dim
    )
    embeddings = vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return shape.num_layers * per_layer + embeddings + shape.hidden_size


def training_flops_per_token(shape: Shape, vocab_size: int, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 per parameter in a matrix product, and attention's 6 L H d T.

    The embedding look-up multiplies nothing, the head does; causal attention reads T/2 keys on average, in two products.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, with causal attention counted once.
    """
    matrix = num_parameters(shape, vocab_size) - (
        0 if shape.tied_embeddings else vocab_size * shape.hidden_size
    )
    return 6.0 * matrix + 6.0 * shape.num_layers * shape.num_heads * shape.head_dim * sequence_length
