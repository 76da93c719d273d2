"""One optimizer step over all documents, split into micro-batches, packed and spread over ranks in every way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.integrations.small_models import examples, pack, pad
from torch import Tensor, distributed


@dataclass(frozen=True)
class Layout:
    """How many documents each micro-batch of all ranks has, and whether they share a row."""

    sizes: tuple[int, ...]
    is_packed: bool


LAYOUTS: dict[str, Layout] = {
    "one batch": Layout((12,), is_packed=False),
    "two batches": Layout((5, 7), is_packed=False),
    "eight batches": Layout((2, 1, 1, 3, 1, 1, 2, 1), is_packed=False),
    "one row": Layout((12,), is_packed=True),
    "two rows": Layout((5, 7), is_packed=True),
    "eight rows": Layout((2, 1, 1, 3, 1, 1, 2, 1), is_packed=True),
}


@dataclass(frozen=True)
class Step:
    """What one rank has of the step."""

    layout: Layout
    directory: Path
    rank: int = 0
    num_ranks: int = 1

    def all_batches(self) -> list[dict[str, Tensor]]:
        """Micro-batches of all ranks."""
        rows, batches = examples(), []
        for size in self.layout.sizes:
            batch, rows = rows[:size], rows[size:]
            batches.append(pack(batch) if self.layout.is_packed else pad(batch))
        assert not rows
        return batches

    def batches(self) -> list[dict[str, Tensor]]:
        """Micro-batches of this rank."""
        return self.all_batches()[self.rank :: self.num_ranks]

    def count_targets(self) -> Tensor:
        """Targets of all ranks, each of which counts its own."""
        count = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in self.batches()]).sum()
        if self.num_ranks > 1:
            distributed.all_reduce(count)
        return count

    @property
    def num_batches(self) -> int:
        """Micro-batches of this rank."""
        return len(self.layout.sizes) // self.num_ranks

    def dataset(self) -> list[dict[str, Any]]:
        """Micro-batches of all ranks as the rows of a dataset, from which a trainer takes one at a time."""
        return [{name: value.tolist() for name, value in batch.items()} for batch in self.all_batches()]


def take_batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The one micro-batch of a dataset of micro-batches."""
    (row,) = rows
    return {name: torch.tensor(value) for name, value in row.items()}
