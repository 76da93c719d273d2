"""Run as a script: two processes, each with a part of the documents, end with the gradient of one process with all.

It exits with 0 where they do in every way of training, and names each way on standard output.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from tests.integrations.small_models import (
    SHAPING,
    assert_same_gradients,
    examples,
    expected_gradients,
    gradients,
    num_targets,
    pad,
    small_model,
)
from tests.integrations.trainers import run_trainer, sft_trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlprior.integrations.huggingface import patch_model, shaped_loss
from rlprior.integrations.trl import patch_trainer
from rlprior.objectives import linear_shaped_cross_entropy

WORLD_SIZE = 2


class HiddenStates(nn.Module):
    """The model without its head, as a plain loop has it; the head's weight is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model().model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def plain_loop(rank: int, directory: Path) -> dict[str, Tensor]:
    """Summed loss over the documents of all ranks; the wrapper averages gradients, so each rank multiplies by their number."""
    module = HiddenStates()
    wrapped = DistributedDataParallel(module)
    rows = examples()[rank::WORLD_SIZE]
    count = torch.tensor(num_targets(rows))
    dist.all_reduce(count)
    batch = pad(rows)
    hidden = wrapped(batch["input_ids"], batch["attention_mask"])[:, :-1]
    loss = linear_shaped_cross_entropy(
        hidden, module.model.embed_tokens.weight, batch["labels"][:, 1:], SHAPING, reduction="sum"
    )
    (loss / count * WORLD_SIZE).backward()
    return gradients(module)


def wrapped_patched_model(rank: int, directory: Path) -> dict[str, Tensor]:
    model = small_model()
    patch_model(model, SHAPING)
    wrapped = DistributedDataParallel(model)
    batch = pad(examples()[rank::WORLD_SIZE])
    (wrapped(**batch, num_items_in_batch=num_targets(examples())).loss * WORLD_SIZE).backward()
    return gradients(model)


def trainer_with_patched_model(rank: int, directory: Path) -> dict[str, Tensor]:
    model = small_model()
    patch_model(model, SHAPING)
    return run_trainer(model, directory, batch_size=1, accumulation=2)


def trainer_from_logits(rank: int, directory: Path) -> dict[str, Tensor]:
    return run_trainer(
        small_model(), directory, batch_size=1, accumulation=2, compute_loss_func=shaped_loss(SHAPING)
    )


def patched_sft_trainer(rank: int, directory: Path) -> dict[str, Tensor]:
    trainer, catcher = sft_trainer(small_model(), directory, batch_size=2)
    patch_trainer(trainer, SHAPING)
    trainer.train()
    return catcher.gradients


WAYS: tuple[Callable[[int, Path], dict[str, Tensor]], ...] = (
    trainer_with_patched_model,
    trainer_from_logits,
    patched_sft_trainer,
    plain_loop,
    wrapped_patched_model,
)


def run_rank(rank: int, port: int, directory: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for way in WAYS:
        found = way(rank, directory)
        assert_same_gradients(found, expected_gradients())
        print(f"rank {rank}: {way.__name__}", flush=True)
    dist.destroy_process_group()


def main() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # forked, so that the imports are paid for once; nothing has been computed in this process
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            context.Process(target=run_rank, args=(rank, port, Path(directory))) for rank in range(WORLD_SIZE)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
