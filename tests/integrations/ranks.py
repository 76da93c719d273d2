"""Run as a script with a folder: 2 and then 4 processes take every step that the table asks of them.

Each rank leaves `{ranks}-{rank}.pt` there: what it found in each cell, up to the first that failed, which holds the traceback.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.integrations.steps import LAYOUTS, Step
from tests.integrations.ways import WAYS

NUM_RANKS = (2, 4)


def cells(num_ranks: int) -> list[tuple[str, str]]:
    """Every way with every layout that gives all ranks the same number of micro-batches."""
    return [
        (way, layout)
        for way in WAYS
        for layout in LAYOUTS
        if len(LAYOUTS[layout].sizes) % num_ranks == 0
        and (LAYOUTS[layout].is_packed or not WAYS[way].packs_itself)
    ]


def run_rank(rank: int, num_ranks: int, port: int, directory: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    found: dict[tuple[str, str], Any] = {}
    for way, layout in cells(num_ranks):
        try:
            found[way, layout] = WAYS[way].train(Step(LAYOUTS[layout], directory, rank, num_ranks))
        except Exception:
            found[way, layout] = traceback.format_exc()
            break  # the other ranks wait for this one somewhere else
    torch.save(found, directory / f"{num_ranks}-{rank}.pt")
    dist.destroy_process_group()


def main(directory: Path) -> None:
    # forked, so that the imports are paid for once; nothing has been computed in this process
    context = get_context("fork")
    for num_ranks in NUM_RANKS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [
            context.Process(target=run_rank, args=(rank, num_ranks, port, directory))
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
