"""A vocabulary in shards: each process of a group holds some rows of the output weight, or some columns of the logits.

Every process sees all positions and returns the same loss. Two collectives a chunk carry a few numbers a position and,
where a head is selected, its `top_k` largest local logits; the gradient of the hidden states is summed once.

Shape suffixes: N positions, C values a position, S sums a position, P processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class VocabularyShard:
    """Says that weight or logits hold this process's part of the vocabulary, the parts in the order of the ranks.

    Args:
        group: processes that hold the parts, of any sizes; None is the default group.
        vocab_size: number of tokens; what the parts hold beyond it is padding and takes no part. None: there is none.

    >>> VocabularyShard(vocab_size=151669).vocab_size
    151669
    """

    group: distributed.ProcessGroup | None = None
    vocab_size: int | None = None

    def locate(self, num_columns: int, device: torch.device) -> ShardColumns:
        """The columns of this process, which holds `num_columns` with padding.

        Raises:
            ValueError: `vocab_size` is more than all processes hold.
        """
        own = torch.tensor([[num_columns]], dtype=torch.int64, device=device)
        sizes = [int(size) for size in _gather(own, self.group).flatten()]
        vocab_size = sum(sizes) if self.vocab_size is None else self.vocab_size
        if not 1 <= vocab_size <= sum(sizes):
            raise ValueError(
                f"vocab_size must be in [1, {sum(sizes)}], what the processes hold, got {vocab_size}"
            )
        start = sum(sizes[: distributed.get_rank(self.group)])
        stop = min(start + num_columns, vocab_size)
        return ShardColumns(self.group, start, max(stop - start, 0), vocab_size, max(sizes))


@dataclass(frozen=True)
class ShardColumns:
    """Where this process's columns lie in the vocabulary, and what it asks of the processes that hold the others.

    Every process of the group makes the same calls in the same order.

    Attributes:
        start: token of the first column.
        num_tokens: columns that are tokens; those after them are padding.
        vocab_size: tokens of all processes.
        max_columns: columns of the process that holds most, from which all derive the same chunks.
    """

    group: distributed.ProcessGroup | None
    start: int
    num_tokens: int
    vocab_size: int
    max_columns: int

    def local_targets(self, targets_N: Tensor, num_columns: int) -> Tensor:
        """Column of each target here, or the last of the columns where another process holds it."""
        columns_N = targets_N - self.start
        is_here_N = (columns_N >= 0) & (columns_N < self.num_tokens)
        return torch.where(is_here_N, columns_N, num_columns - 1)

    def gather(self, values_NC: Tensor) -> Tensor:
        """The values of all processes, [P, N, C]; C is the same everywhere."""
        return _gather(values_NC, self.group)

    def add_up(self, sums_SN: Tensor) -> Tensor:
        """Sums over all processes, in place."""
        distributed.all_reduce(sums_SN, group=self.group)  # pyright: ignore[reportUnknownMemberType]
        return sums_SN


def _gather(values_NC: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    world_size = distributed.get_world_size(group)
    gathered_PNC = values_NC.new_empty((world_size, *values_NC.shape))
    distributed.all_gather(list(gathered_PNC.unbind()), values_NC.contiguous(), group=group)  # pyright: ignore[reportUnknownMemberType]
    return gathered_PNC
