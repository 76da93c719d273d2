"""The sizes of chunks and blocks: enough rows for the products, within memory."""

from __future__ import annotations

import pytest
import torch

from rlprior.objectives import CrossEntropy, linear
from rlprior.objectives.batch import TokenBatch
from rlprior.objectives.chunk_sizes import choose_block_rows, choose_chunk_rows
from rlprior.objectives.closed_form import Scratch, evaluate_rows_

GIB = 2**30


@pytest.mark.parametrize(
    ("num_columns", "width", "expected"),
    [
        (151936, 512, 256),
        (8192, 256, 256),
        (1000, 64, 1048),  # a small vocabulary: a million logits
        (1000, 8192, 256),  # a wide model: no more than a million hidden numbers
        (1, 0, 2**20),
        (0, 0, 2**20),  # the empty part of a shard
    ],
)
def test_chunks_on_a_cpu(num_columns: int, width: int, expected: int):
    assert choose_chunk_rows(torch.device("cpu"), num_columns, width, logit_bytes=4) == expected


@pytest.mark.parametrize(
    ("width", "logit_bytes", "memory_bytes", "expected"),
    [
        (512, 2, 80 * GIB, 2048),  # at least
        (
            1536,
            2,
            80 * GIB,
            3072,
        ),  # 151936 logits of 3072 rows weigh as much as 151936 rows of 1536 float32 numbers
        (4096, 2, 80 * GIB, 4096),  # at most
        (4096, 4, 80 * GIB, 4096),
        (2560, 4, 80 * GIB, 2560),
        (4096, 4, 16 * GIB, 1766),  # 1 GiB over 4 bytes over 151936
        (4096, 4, 1000, 1),
    ],
)
def test_chunks_on_a_gpu(width: int, logit_bytes: int, memory_bytes: int, expected: int):
    assert choose_chunk_rows(torch.device("cuda"), 151936, width, logit_bytes, memory_bytes) == expected


def test_other_devices_say_nothing_of_their_memory():
    assert choose_chunk_rows(torch.device("meta"), 151936, 4096, logit_bytes=2) == 4096


@pytest.mark.parametrize(
    ("device", "num_columns", "expected"),
    [("cpu", 151936, 6), ("cpu", 2**21, 1), ("cuda", 151936, 441), ("cuda", 32000, 2097)],
)
def test_blocks_bound_the_buffers(device: str, num_columns: int, expected: int):
    assert choose_block_rows(torch.device(device), num_columns) == expected


def test_plain_cross_entropy_takes_one_buffer_of_a_block():
    plan = linear._plan(CrossEntropy(), None, False, None, 0.0)
    batch = TokenBatch(torch.tensor([0, 2]), None, None, None)
    scratch = Scratch()
    evaluate_rows_(torch.zeros(2, 5), batch, plan, scratch, torch.ones(2))
    assert scratch._buffers.keys() == {"probs"}
