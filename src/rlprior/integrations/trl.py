"""TRL's SFTTrainer: the loss in place of its own, without logits and with all that it logs.

The trainer calls its model with `fused_lm_head=True` and reads sums off the answer: of `log_probs`, which it divides by
the batch's number of tokens and scales for the ranks, and of `label_mask`, `entropy` and `is_top1`, which it logs. The
model of a patched trainer answers with the sums themselves, so that everything else stays the trainer's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlprior.integrations.huggingface import patch_model
from rlprior.objectives import Objective
from rlprior.objectives.linear import Implementation


def patch_trainer(
    trainer: Any,
    shaping: Objective,
    *,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    implementation: Implementation = "auto",
) -> None:
    """Make a `trl.SFTTrainer` train and evaluate the shaped loss without computing logits.

    Call it once, after the trainer was made and before `trainer.train()`.

    Args:
        trainer: of trl 1.16 or newer, with `loss_type="nll"`, without `compute_loss_func` and label smoothing.
        shaping: settings of any objective.
        z_loss, chunk_rows, implementation: as in `patch_model`.

    Raises:
        ValueError: a trainer, model, shaping or option that this cannot serve.
    """
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    code = getattr(vars(model).get("forward"), "__code__", None)
    if code is None or code.co_name != "_fused_forward":
        raise ValueError(
            "patch_trainer needs an SFTTrainer of trl 1.16 or newer that was not patched before "
            "(pip install 'trl>=1.16')"
        )
    args = trainer.args
    if args.loss_type != "nll" or args.label_smoothing_factor != 0 or trainer.compute_loss_func is not None:
        raise ValueError(
            "patch_trainer replaces the trainer's loss, so leave loss_type at 'nll', label_smoothing_factor at 0 and "
            "compute_loss_func out; label smoothing and DFT are objectives: LabelSmoothing(...), DynamicFineTuning()"
        )
    patch_model(
        model,
        shaping,
        z_loss=z_loss,
        chunk_rows=chunk_rows,
        implementation=implementation,
        metrics=True,
        eval_logits=False,
    )
    model.forward = _TrainerForward(model.forward)
    trainer.model_accepts_loss_kwargs = True  # or a model that says no gets means of micro-batches


@dataclass
class _Answer:
    """What the trainer reads, each field one number that the trainer sums."""

    log_probs: Tensor
    label_mask: Tensor
    entropy: Tensor
    is_top1: Tensor
    aux_loss: Tensor | None


class _TrainerForward:
    """`model.forward` under a patched trainer."""

    def __init__(self, patched: Callable[..., Any]) -> None:
        self.patched = patched

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's: the trainer and generate() read from it what the model takes."""
        return inspect.signature(self.patched)

    def __call__(
        self, *args: Any, fused_lm_head: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return self.patched(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        outputs = self.patched(*args, **kwargs)
        return _Answer(
            log_probs=-outputs["objective_sum"].reshape(1),
            label_mask=outputs["num_targets"].reshape(1),
            entropy=outputs["entropy_sum"].reshape(1),
            is_top1=outputs["num_correct"].reshape(1),
            aux_loss=outputs.get("aux_loss"),
        )
