"""Model shapes: the first paper's models (Table 1), dense and mixture of experts, and small ones of the same architectures."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Dimensions of a Qwen3-style decoder. Its feed-forward networks are all dense, or all mixtures of experts.

    Args:
        num_layers: blocks of attention and feed-forward network.
        hidden_size: width D of the residual stream.
        intermediate_size: width of a feed-forward network: of the dense one, or of each expert.
        num_heads, num_key_value_heads, head_dim: attention; a key-value head serves `num_heads / num_key_value_heads` heads.
        num_experts: experts of each layer; 0 for a dense model.
        num_experts_per_token: how many of them each token is routed to; 0 for a dense model.
        tied_embeddings: the output embedding is the input embedding.

    Source: Diversity or Precision?, arXiv:2512.22955, Table 1 (`intermediate_size` is its d_ffn or d_expert).
    Differs: Table 1 gives no head dimension, vocabulary or tying. Head dimension 128 and tied embeddings are our assumption for the
    paper's models; the vocabulary always comes from the tokenizer (Qwen3's own models have 151936 entries).
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    num_experts: int = 0
    num_experts_per_token: int = 0
    tied_embeddings: bool = True


PRESETS: dict[str, Shape] = {
    "tiny": Shape(
        num_layers=3, hidden_size=128, intermediate_size=352, num_heads=4, num_key_value_heads=2, head_dim=32
    ),
    "tiny-moe": Shape(
        num_layers=3,
        hidden_size=128,
        intermediate_size=176,
        num_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_token=2,
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
    "100m-moe": Shape(
        num_layers=8,
        hidden_size=512,
        intermediate_size=128,
        num_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_token=4,
    ),
    "1b": Shape(num_layers=28, hidden_size=1536, intermediate_size=4608, num_heads=16, num_key_value_heads=4),
    "4b": Shape(num_layers=36, hidden_size=2560, intermediate_size=9728, num_heads=32, num_key_value_heads=8),
    "5b-a0.3b": Shape(
        num_layers=12,
        hidden_size=1024,
        intermediate_size=320,
        num_heads=32,
        num_key_value_heads=4,
        num_experts=384,
        num_experts_per_token=12,
    ),
    "10b-a0.5b": Shape(
        num_layers=16,
        hidden_size=1536,
        intermediate_size=320,
        num_heads=32,
        num_key_value_heads=4,
        num_experts=384,
        num_experts_per_token=12,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A preset, with any of its dimensions replaced.

    Args:
        preset: one of `PRESETS`.
        rope_theta: base of the rotary position embedding in pre-training (1e4 in the paper).
        initializer_range: standard deviation of the normal initialisation of every matrix. The paper states none; 0.02 is the default
            of the Hugging Face classes of Qwen3 and dots.llm1, and GPT-2's.
        balancing_rate: step of the routers' selection bias after each optimizer step, for a mixture of experts; 0 only measures
            the load. The paper gives none; 0.001 is DeepSeek-V3's (arXiv:2412.19437, section 4.2).
        num_layers, hidden_size, intermediate_size, num_heads, num_key_value_heads, head_dim, num_experts, num_experts_per_token,
            tied_embeddings: replace the preset's.

    Raises:
        ValueError: unknown preset, or dimensions that do not go together.
    """

    preset: str = "tiny"
    rope_theta: float = 1e4
    initializer_range: float = 0.02
    balancing_rate: float = 1e-3
    num_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_experts: int | None = None
    num_experts_per_token: int | None = None
    tied_embeddings: bool | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset!r} is unknown; known: {', '.join(PRESETS)}")
        for name in ("rope_theta", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        if not 0 <= self.balancing_rate < math.inf:
            raise ValueError(f"balancing_rate must be 0 or more and finite, not {self.balancing_rate}")
        _check(self.shape)

    @property
    def shape(self) -> Shape:
        """The preset with the replacements."""
        given = {field.name: getattr(self, field.name) for field in fields(Shape)}
        return replace(
            PRESETS[self.preset], **{name: value for name, value in given.items() if value is not None}
        )


def _check(shape: Shape) -> None:
    """ValueError unless the dimensions go together."""
    may_be_zero = ("num_experts", "num_experts_per_token", "tied_embeddings")
    for name in (field.name for field in fields(shape)):
        if name not in may_be_zero and getattr(shape, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(shape, name)}")
    if shape.num_heads % shape.num_key_value_heads:
        raise ValueError(
            f"num_heads = {shape.num_heads} must be a multiple of num_key_value_heads = {shape.num_key_value_heads}"
        )
    if shape.head_dim % 2:
        raise ValueError(f"head_dim = {shape.head_dim} must be even for rotary embeddings")
    if shape.num_experts == 0 and shape.num_experts_per_token == 0:
        return
    # the router of the Hugging Face class ranks groups of experts by their two best
    if shape.num_experts < 2:
        raise ValueError(f"num_experts must be 0 (dense) or at least 2, not {shape.num_experts}")
    if not 1 <= shape.num_experts_per_token <= shape.num_experts:
        raise ValueError(
            f"num_experts_per_token must lie between 1 and num_experts = {shape.num_experts}, "
            f"not {shape.num_experts_per_token}"
        )


def _layer_parameters(shape: Shape, num_experts: int) -> int:
    """Of one layer that has, or for one token uses, so many experts."""
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_key_value_heads)
    network = 3 * shape.hidden_size * shape.intermediate_size
    router = shape.hidden_size * shape.num_experts
    norms = 2 * shape.hidden_size + 2 * shape.head_dim
    return attention + network * max(1, num_experts) + router + norms


def num_parameters(shape: Shape, vocab_size: int) -> int:
    """Parameters of the model, embeddings included (once where they are tied); the routers' bias is a buffer and not counted."""
    embeddings = vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return shape.num_layers * _layer_parameters(shape, shape.num_experts) + embeddings + shape.hidden_size


def num_active_parameters(shape: Shape) -> int:
    """Parameters that one token passes through, without embeddings: all of a dense model's, or the router and the chosen experts.

    >>> f"{num_active_parameters(PRESETS['10b-a0.5b']):,}"
    '519,099,904'
    """
    return shape.num_layers * _layer_parameters(shape, shape.num_experts_per_token) + shape.hidden_size


def training_flops_per_token(shape: Shape, vocab_size: int, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 per parameter in a matrix product, and attention's 6 L H d T.

    Of the experts only the chosen ones multiply. The embedding look-up multiplies nothing, the head does; causal attention reads
    T/2 keys on average, in two products. Norms are counted as if they were matrices: 0.2% of `tiny`, less of larger ones.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, with causal attention counted once.
    """
    matrix = num_active_parameters(shape) + vocab_size * shape.hidden_size
    return 6.0 * matrix + 6.0 * shape.num_layers * shape.num_heads * shape.head_dim * sequence_length
