"""A vocabulary in shards: each process of a group holds some rows of the output weight, or some columns of the logits.

Every process sees all positions and returns the same loss. A call begins with one gather of a few numbers. A chunk takes a
gather of the target's and the largest logit, a sum of some masses, and, where a head is selected, a gather of the `top_k`
largest local logits in between. The gradient of the hidden states is summed once.

Shape suffixes: N positions, C values a position, S sums a position, P processes, M numbers of a process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from rlprior.objectives.batch import TokenBatch


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

    def locate(self, num_columns: int, batch: TokenBatch, *, wants_hidden: bool) -> ShardColumns:
        """The columns of this process, which holds `num_columns` with padding.

        Raises:
            ValueError: `vocab_size` is more than all processes hold, or the processes differ in what decides their
                collectives; on each of them.
        """
        places_N = torch.arange(1, batch.targets_N.numel() + 1, device=batch.targets_N.device)
        own = {
            "columns": num_columns,
            "positions": batch.targets_N.numel(),
            "targets that count": batch.num_targets,
            "sum of target times place": int((batch.targets_N * places_N).sum()),
            "whether hidden requires grad": int(wants_hidden),
        }
        own_1M = torch.tensor([list(own.values())], device=batch.targets_N.device)
        gathered_MP = _gather(own_1M, self.group)[:, 0].T
        sizes, *others = [[int(number) for number in row_P] for row_P in gathered_MP]
        differing = [
            f"{name} {values}"
            for name, values in zip(list(own)[1:], others, strict=True)
            if len(set(values)) > 1
        ]
        if differing:
            raise ValueError(
                "the processes of a shard must pass the same hidden states and targets, but differ in "
                f"(rank by rank) {', '.join(differing)}"
            )
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
