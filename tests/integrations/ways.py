"""Every way of training with the loss: the gradient of one step over all documents, from each integration.

With several ranks, each way combines them as its trainer does: DistributedDataParallel, FSDP2, or a vocabulary in shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from tests.integrations.small_models import SHAPING, VOCABULARY, examples, gradients, small_model
from tests.integrations.steps import Step, take_batch
from tests.integrations.titan_double import torchtitan_losses
from tests.integrations.trainers import run_trainer, sft_trainer
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from rlprior.integrations.huggingface import patch_model, shaped_loss
from rlprior.integrations.liger import FusedLinearShapedCrossEntropyLoss
from rlprior.integrations.megatron import vocab_parallel_shaped_cross_entropy
from rlprior.integrations.next_token import shift_left
from rlprior.integrations.torchtitan import shaped_loss_config
from rlprior.integrations.trl import patch_trainer
from rlprior.objectives import linear_shaped_cross_entropy


class HiddenStates(nn.Module):
    """A model without its head, as a plain loop has it; the head's weight is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model().model

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).last_hidden_state


class LossInside(HiddenStates):
    """The same, ending in the summed loss, so that FSDP has the weight at hand."""

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return summed_loss(super().forward(labels, **inputs), self.model.embed_tokens.weight, labels)


class HeadApart(nn.Module):
    """A model whose head the loss may call, as in torchtitan."""

    def __init__(self) -> None:
        super().__init__()
        whole = small_model("llama")
        self.model, self.lm_head = whole.model, whole.lm_head

    def forward(self, *, skips_head: bool, **inputs: Tensor) -> Tensor:
        hidden = self.model(**inputs).last_hidden_state
        return hidden if skips_head else self.lm_head(hidden)


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_shaped_cross_entropy(hidden, weight, shift_left(labels, -100), SHAPING, reduction="sum")


def liger_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss = FusedLinearShapedCrossEntropyLoss(SHAPING, reduction="sum")
    return loss(weight, hidden.flatten(0, 1), shift_left(labels, -100).flatten())


def replicate(module: nn.Module, step: Step) -> nn.Module:
    return DistributedDataParallel(module) if step.num_ranks > 1 else module


def shard(module: nn.Module, units: list[list[nn.Module]], step: Step) -> nn.Module:
    """FSDP2 with these units and one for the rest."""
    if step.num_ranks > 1:
        for unit in units:
            fully_shard(unit, reshard_after_forward=unit is not units[-1])
        fully_shard(module)
    return module


def micro_batches(module: nn.Module, step: Step) -> Iterator[dict[str, Tensor]]:
    """This rank's, for a loop that lets the ranks combine their gradients after the last one alone."""
    batches = step.batches()
    for number, batch in enumerate(batches, 1):
        is_last = number == len(batches)
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(is_last)
        waits = isinstance(module, DistributedDataParallel) and not is_last
        with module.no_sync() if waits else nullcontext():
            yield batch


def plain_loop(
    step: Step, loss: Callable[[Tensor, Tensor, Tensor], Tensor] = summed_loss
) -> dict[str, Tensor]:
    """The wrapper averages gradients over the ranks, so each of them multiplies by their number."""
    module = HiddenStates()
    wrapped, count = replicate(module, step), step.count_targets()
    for batch in micro_batches(wrapped, step):
        summed = loss(wrapped(**batch), module.model.embed_tokens.weight, batch["labels"])
        (summed / count * step.num_ranks).backward()
    return gradients(module)


def liger_call(step: Step) -> dict[str, Tensor]:
    return plain_loop(step, liger_loss)


def sharded_plain_loop(step: Step) -> dict[str, Tensor]:
    module = LossInside()
    sharded = shard(module, [[layer] for layer in module.model.layers], step)
    count = step.count_targets()
    for batch in micro_batches(sharded, step):
        (sharded(**batch) / count * step.num_ranks).backward()
    return gradients(module)


def patched_loop(model: Any, wrapped: nn.Module, step: Step) -> dict[str, Tensor]:
    count = step.count_targets()
    for batch in micro_batches(wrapped, step):
        (wrapped(**batch, num_items_in_batch=count).loss * step.num_ranks).backward()
    return gradients(model)


def patched_model(step: Step) -> dict[str, Tensor]:
    model = small_model()
    patch_model(model, SHAPING)
    return patched_loop(model, replicate(model, step), step)


def sharded_patched_model(step: Step) -> dict[str, Tensor]:
    """A unit for each decoder layer, and the head, tied to the embedding, in the root's."""
    model = small_model()
    patch_model(model, SHAPING)
    return patched_loop(model, shard(model, [[layer] for layer in model.model.layers], step), step)


def patched_model_in_accelerates_units(step: Step) -> dict[str, Tensor]:
    """Accelerate's FSDP2 puts an untied head and the last norm into a unit that keeps its weights after the forward pass."""
    model = small_model("llama")
    patch_model(model, SHAPING)
    units = [
        *([layer] for layer in model.model.layers),
        [model.model.embed_tokens],
        [model.model.norm, model.lm_head],
    ]
    return patched_loop(model, shard(model, units, step), step)


def trainer_with_patched_model(step: Step) -> dict[str, Tensor]:
    model = small_model()
    patch_model(model, SHAPING)
    return train_on_micro_batches(model, step)


def trainer_from_logits(step: Step) -> dict[str, Tensor]:
    return train_on_micro_batches(small_model(), step, compute_loss_func=shaped_loss(SHAPING))


def train_on_micro_batches(model: Any, step: Step, **options: Any) -> dict[str, Tensor]:
    return run_trainer(
        model,
        step.directory,
        batch_size=1,
        accumulation=step.num_batches,
        train_dataset=step.dataset(),
        data_collator=take_batch,
        **options,
    )


def patched_sft_trainer(step: Step) -> dict[str, Tensor]:
    trainer, catcher = sft_trainer(
        small_model(),
        step.directory,
        batch_size=1,
        accumulation=step.num_batches,
        arguments={"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False},
        train_dataset=datasets.Dataset.from_list(step.dataset()),
        data_collator=take_batch,
    )
    patch_trainer(trainer, SHAPING)
    trainer.train()
    return catcher.gradients


def sft_trainer_that_packs(step: Step) -> dict[str, Tensor]:
    """The documents fill eight rows of twelve tokens, documents whole; the trainer spreads them over its micro-batches."""
    trainer, catcher = sft_trainer(
        small_model(),
        step.directory,
        batch_size=8 // len(step.layout.sizes),
        accumulation=step.num_batches,
        arguments={"packing": True, "max_length": 12},
    )
    rows = trainer.train_dataset
    assert len(rows) == 8
    assert sum(map(len, rows["seq_lengths"])) == len(examples())
    patch_trainer(trainer, SHAPING)
    trainer.train()
    return catcher.gradients


def torchtitan(step: Step, num_chunks: int | None = None) -> dict[str, Tensor]:
    """Each rank divides its sum by the targets of all, and FSDP2 adds gradients up instead of averaging them."""
    module = HeadApart()
    shard(module, [*([layer] for layer in module.model.layers), [module.lm_head]], step)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    with torchtitan_losses() as losses:
        config = shaped_loss_config(SHAPING)
        if num_chunks is not None:
            config = losses.ChunkedLossWrapper.Config(num_chunks=num_chunks, loss_fn=config)
        loss_fn = config.build()
        if num_chunks is not None:
            loss_fn.set_lm_head(module.lm_head)
        count = step.count_targets()
        for batch in step.batches():
            labels, inputs = split_labels(batch, num_chunks or 1)
            pred = module(**inputs, skips_head=num_chunks is not None)
            loss, _ = loss_fn(pred, labels, count, positions=inputs.get("position_ids"))
            loss.backward()
    return gradients(module)


def torchtitan_in_chunks(step: Step) -> dict[str, Tensor]:
    return torchtitan(step, num_chunks=2)


def split_labels(batch: dict[str, Tensor], multiple: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Shifted labels and the model's inputs, lengthened to a multiple."""
    excess = -batch["labels"].shape[1] % multiple
    inputs = {name: pad(value, (0, excess)) for name, value in batch.items() if name != "labels"}
    return pad(shift_left(batch["labels"], -100), (0, excess), value=-100), inputs


def megatron(step: Step) -> dict[str, Tensor]:
    """Each rank has all documents and as many rows of the padded head; the gradient of the hidden states is added up."""
    module = HiddenStates()
    embedding = module.model.embed_tokens.weight
    padding = -VOCABULARY % step.num_ranks
    rows = pad(embedding.detach(), (0, 0, 0, padding), value=9.0).chunk(step.num_ranks)[step.rank]
    head = rows.clone().requires_grad_()
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step.all_batches())
    for batch in step.all_batches():
        hidden_TBD = module(**batch).transpose(0, 1)
        if step.num_ranks > 1:
            hidden_TBD.register_hook(add_up)
        target_TB = shift_left(batch["labels"], -100).T
        loss_TB = vocab_parallel_shaped_cross_entropy(
            hidden_TBD @ head.T, target_TB, SHAPING, distributed.group.WORLD, vocab_size=VOCABULARY
        )
        (loss_TB.sum() / count).backward()
    parts = [torch.empty_like(rows) for _ in range(step.num_ranks)]
    distributed.all_gather(parts, head.grad)
    embedding.grad += torch.cat(parts)[:VOCABULARY]  # tied
    return gradients(module)


def add_up(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    distributed.all_reduce(total)
    return total


@dataclass(frozen=True)
class Way:
    """A way of training, the module of `rlprior.integrations` that it tests ("" for none), and what it trains."""

    train: Callable[[Step], dict[str, Tensor]]
    module: str
    family: str = "qwen3"
    packs_itself: bool = False


WAYS: dict[str, Way] = {
    "plain loop": Way(plain_loop, ""),
    "plain loop, FSDP2": Way(sharded_plain_loop, ""),
    "Liger's call": Way(liger_call, "liger"),
    "patched model": Way(patched_model, "huggingface"),
    "patched model, FSDP2": Way(sharded_patched_model, "huggingface"),
    "patched model, FSDP2 as accelerate does it": Way(
        patched_model_in_accelerates_units, "huggingface", "llama"
    ),
    "Trainer, patched model": Way(trainer_with_patched_model, "huggingface"),
    "Trainer, from logits": Way(trainer_from_logits, "huggingface"),
    "SFTTrainer": Way(patched_sft_trainer, "trl"),
    "SFTTrainer that packs": Way(sft_trainer_that_packs, "trl", packs_itself=True),
    "torchtitan": Way(torchtitan, "torchtitan", "llama"),
    "torchtitan, in chunks": Way(torchtitan_in_chunks, "torchtitan", "llama"),
    "Megatron": Way(megatron, "megatron"),
}
