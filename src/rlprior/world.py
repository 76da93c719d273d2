"""The processes of one run: alone, or several that torchrun started, each with its device.

torchrun --nproc-per-node 8 -m rlprior train train.toml --out runs/big
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run. The first writes; the others compute.

    Args:
        rank: 0 to `size` - 1.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """'cuda' where there are GPUs, one for each process, or else 'cpu'."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        import torch

        if self.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.device_type)

    @property
    def device_name(self) -> str:
        """What torch calls this process's GPU; 'cpu' where there is none."""
        import torch

        return torch.cuda.get_device_name(self.device) if self.device_type == "cuda" else "cpu"

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the processes, in float64; every process passes the same names."""
        if self.size == 1:
            return dict(values)
        import torch
        import torch.distributed as dist

        totals = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return dict(zip(values, totals.tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """Plain data of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first process, on all of them; where it raises, all raise the same.

        The others wait meanwhile: what one process alone does before the rest may go on.
        """
        return self.on_each(lambda: function() if self.is_main else None)[0]  # type: ignore[return-value]

    def on_each(self, function: Callable[[], T]) -> list[T]:
        """What `function` returns on each process, on all of them; where it raises on one, all raise the same."""
        if self.size == 1:
            return [function()]
        outcome: tuple[T | None, Exception | None]
        try:
            outcome = (function(), None)
        except Exception as error:
            outcome = (None, error)
        outcomes = self.gather(outcome)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]  # type: ignore[misc]


ALONE = World()
"""A process that nobody else works with."""


@contextlib.contextmanager
def join_world() -> Iterator[World]:
    """The world that torchrun's environment variables describe, or a process alone where there are none.

    A process alone opens no process group. Several speak gloo on CPUs and nccl on GPUs.
    """
    import torch

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if ALONE.device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    # plain data and offloaded weights go over gloo; others wait while the first process writes and hashes a checkpoint
    backend = "cpu:gloo,cuda:nccl" if ALONE.device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End with this exit code; one of several processes without Python's own clearing up.

    A thread of gloo's may still be about to free a tensor, and one that does so while Python ends aborts the process. Everything that
    a run keeps is on disk by then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
