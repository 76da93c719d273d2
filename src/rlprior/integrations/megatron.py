"""Megatron-LM: the loss of vocabulary-parallel logits, in place of `vocab_parallel_cross_entropy`.

Shape suffixes: T positions, B rows, V columns of this rank.
"""

from __future__ import annotations

import importlib

from torch import Tensor
from torch.distributed import ProcessGroup

from rlprior.integrations.next_token import IGNORE_INDEX
from rlprior.objectives import Objective, VocabularyShard, shaped_cross_entropy


def vocab_parallel_shaped_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    shaping: Objective,
    tp_group: ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Loss [T, B] of each position, the same on every rank of the tensor-parallel group.

    Args:
        vocab_parallel_logits: [T, B, V], this rank's columns; left as they are.
        target: [T, B], tokens of the whole vocabulary, already shifted; -100 counts for nothing. The loss mask stays the caller's.
        shaping: settings of any objective but `SampledReward`.
        tp_group: the tensor-parallel group; None is Megatron's own.
        vocab_size: number of tokens where the last ranks hold padding (`--make-vocab-size-divisible-by`), which then takes no
            part; None counts padding as tokens, as Megatron does.
        z_loss: as in `shaped_cross_entropy`.

    Raises:
        ImportError: no group given and Megatron is not installed.
        ValueError: an objective or inputs that do not fit.

    Differs: Megatron overwrites the logits, and its label smoothing under tensor parallelism spreads over one rank's
    columns; `LabelSmoothing` here spreads over all.
    """
    shard = VocabularyShard(_megatron_group() if tp_group is None else tp_group, vocab_size=vocab_size)
    return shaped_cross_entropy(
        vocab_parallel_logits,
        target,
        shaping,
        ignore_index=IGNORE_INDEX,
        reduction="none",
        shard=shard,
        z_loss=z_loss,
    )


def _megatron_group() -> ProcessGroup:
    try:
        state = importlib.import_module("megatron.core.parallel_state")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "megatron":
            raise
        raise ImportError(
            "give tp_group, or install Megatron, whose group is taken otherwise: pip install megatron-core"
        ) from None
    group: ProcessGroup = state.get_tensor_model_parallel_group()
    return group
