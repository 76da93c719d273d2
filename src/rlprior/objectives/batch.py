"""One flattened batch: which positions count, with which weight, and what is measured on them.

Shape suffixes: N flattened positions, S draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Size, Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums, losses and metrics: float64 for float64 logits, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class TokenMetrics:
    """Measurements of the model at each target, free of the objective; shaped like the targets, detached, nan where ignored.

    Attributes:
        cross_entropy: `-log p_x` in nats.
        entropy: `-sum_j p_j log p_j` in nats.
        head_mass: probability of the head, the target included where it is in the head.
        head_size: number of tokens in the head: `top_k`, more where logits tie with the last one, fewer where fewer are
            finite.
        target_rank: 1 + the number of logits strictly greater than the target's.
        top_prob: probability of the most probable token.
    """

    cross_entropy: Tensor
    entropy: Tensor
    head_mass: Tensor
    head_size: Tensor
    target_rank: Tensor
    top_prob: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The metrics in the order of the fields."""
        return (
            self.cross_entropy,
            self.entropy,
            self.head_mass,
            self.head_size,
            self.target_rank,
            self.top_prob,
        )

    def reshape(self, shape: Size) -> TokenMetrics:
        """The same metrics in another shape."""
        return TokenMetrics(*(tensor.reshape(shape) for tensor in self.tensors()))


@dataclass(frozen=True)
class TokenBatch:
    """Flattened targets with what belongs to them.

    Attributes:
        targets_N: int64, contiguous: the kernels read one after the other.
        weights_N: constant weight of each position's loss, in the dtype of the statistics; None is 1 everywhere.
        uniforms_NS: float64 numbers in [0, 1) that decide the draws of a sampled objective.
        kept: indices of the positions that are not ignored, or None where all are.
    """

    targets_N: Tensor
    weights_N: Tensor | None
    uniforms_NS: Tensor | None
    kept: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the batch consists of, in the order of the fields."""
        return self.targets_N, self.weights_N, self.uniforms_NS, self.kept

    @property
    def num_targets(self) -> int:
        """Number of positions that are not ignored."""
        return self.targets_N.numel() if self.kept is None else self.kept.numel()

    def positions(self, start: int, stop: int) -> slice | Tensor:
        """Index of the positions from the `start`-th to before the `stop`-th of those that are not ignored."""
        return slice(start, stop) if self.kept is None else self.kept[start:stop]

    def select(self, rows: slice | Tensor) -> TokenBatch:
        """The batch of these positions alone, none of which is ignored."""
        return TokenBatch(
            targets_N=self.targets_N[rows],
            weights_N=None if self.weights_N is None else self.weights_N[rows],
            uniforms_NS=None if self.uniforms_NS is None else self.uniforms_NS[rows],
            kept=None,
        )
