"""How many positions have their logits held at a time (a chunk), and how many of these are evaluated together (a block)."""

from __future__ import annotations

from typing import Any, cast

import torch

# Measured on CPU: below 256 rows matrix products lose speed, and smaller blocks lose it to the overhead of each pass.
CPU_CHUNK_ROWS = 256
CPU_BLOCK_ELEMENTS = 2**20

# On devices by arithmetic, not measured. A chunk of R rows adds to the weight's gradient once: 8 bytes moved an entry for
# 2 R operations, which devices that do 300 operations in the time of a byte make up for from R = 1200 on.
DEVICE_CHUNK_ROWS = (2048, 4096)
DEVICE_MEMORY_SHARE = 1 / 16
# The generic code holds up to five float32 buffers of a block; 256 MiB each occupy any device.
DEVICE_BLOCK_ELEMENTS = 2**26


def choose_chunk_rows(
    device: torch.device, num_columns: int, width: int, logit_bytes: int, memory_bytes: int | None = None
) -> int:
    """Rows of a chunk.

    On a CPU as few as the products run at full speed with. On a device as many as have logits of the size of the weight's
    float32 gradient, which is held anyway, but 2048 to 4096, and fewer where their logits pass a sixteenth of its memory.

    Args:
        num_columns: V.
        width: D, or 0 where no product is taken.
        logit_bytes: of one logit.
        memory_bytes: of the device; None asks it, where it can say.

    >>> choose_chunk_rows(torch.device("cuda"), 151936, 1536, logit_bytes=2, memory_bytes=80 * 10**9)
    3072
    """
    num_columns = max(num_columns, 1)
    if device.type == "cpu":
        return max(CPU_CHUNK_ROWS, CPU_BLOCK_ELEMENTS // max(num_columns, width))
    if memory_bytes is None and device.type == "cuda":
        memory_bytes = int(cast(Any, torch.cuda).get_device_properties(device).total_memory)
    lowest, highest = DEVICE_CHUNK_ROWS
    num_rows = min(max(4 * width // logit_bytes, lowest), highest)
    if memory_bytes is not None:
        num_rows = min(num_rows, int(memory_bytes * DEVICE_MEMORY_SHARE) // (num_columns * logit_bytes))
    return max(num_rows, 1)


def choose_block_rows(device: torch.device, num_columns: int) -> int:
    """Rows of a block for the generic code, whose passes each read and write whole buffers."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    return max(1, elements // num_columns)
