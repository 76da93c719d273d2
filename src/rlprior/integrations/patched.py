"""The parts of a causal language model that `patch_model` replaces.

A patched model keeps its own forward pass. Two things answer differently while it runs with labels: the output head puts
its input aside and lets a row of known numbers go on in place of the logits, and `loss_function` answers zero. When the
forward pass is over, the loss of what was put aside is added. So whatever the forward pass does besides (router losses,
images, caches) stays its own, and what it does to its logits is read off the known numbers, or refused.

Shape suffixes: B rows, T positions, V vocabulary, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlprior.integrations.next_token import IGNORE_INDEX, divide_by_count, shift_left, start_draws
from rlprior.objectives import Objective, TokenMetrics, linear_shaped_cross_entropy, shaped_cross_entropy
from rlprior.objectives.linear import Implementation, outside_compiled_graphs

# The known number at the end of the row; a power of two, so that dividing by it is exact.
PROBE_LIMIT = 8.0

UNKNOWN_CHANGE = (
    "the model changes its logits in a way that patch_model does not know (it knows a factor, and the "
    "softcap of config.final_logit_softcapping); use compute_loss_func=shaped_loss(...)"
)

LEARNED_CHANGE = (
    "what the model does to its logits is learned, and patch_model knows fixed factors only; "
    "use compute_loss_func=shaped_loss(...)"
)


@dataclass
class _Call:
    """What one call with labels brings, and what is put aside on its way through the model."""

    targets_BT: Tensor
    token_weights_BT: Tensor | None
    num_items_in_batch: Tensor | int | None
    wants_logits: bool
    hidden_BTD: Tensor | None = None
    weight_VD: Tensor | None = None
    # the known numbers, after what the model does to logits, unless logits are wanted
    logits: Tensor | None = None


class ModelLoss:
    """The loss of a patched model: its `loss_function`, shared with its forward pass and its output head."""

    def __init__(
        self,
        shaping: Objective,
        z_loss: float,
        chunk_rows: int | None,
        implementation: Implementation,
        wants_metrics: bool,
        logit_softcap: float | None,
    ) -> None:
        self.shaping = shaping
        self.draws = start_draws(shaping)
        self.z_loss = z_loss
        self.chunk_rows = chunk_rows
        self.implementation: Implementation = implementation
        self.wants_metrics = wants_metrics
        self.logit_softcap = logit_softcap
        self.call: _Call | None = None

    def stand_in(self, hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Known numbers [1, ..., V] in place of the logits, after the head's input and weight were put aside."""
        assert self.call is not None
        if self.call.hidden_BTD is not None:
            raise RuntimeError(
                "the model calls its output head twice: patch_model cannot tell for which loss"
            )
        if isinstance(weight_VD, DTensor):
            raise ValueError(
                "the output head is split over ranks (tensor parallelism), which patch_model does not support; "
                "leave it out of the plan"
            )
        self.call.hidden_BTD, self.call.weight_VD = hidden_BTD, weight_VD
        return _known_numbers(hidden_BTD, weight_VD)

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int | None = None, **kwargs: object
    ) -> Tensor:
        """Zero, for the model to add its own losses to; the loss itself follows when the forward pass is over."""
        if self.call is None:
            raise RuntimeError("a patched model takes its labels by keyword: model(input_ids, labels=...)")
        self.call.logits = logits
        return logits.new_zeros((), dtype=torch.float32)

    def compute(self, call: _Call) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a call whose forward pass is over, normalised, and the sums that the model reports."""
        total, metrics = self._from_logits(call) if call.wants_logits else self._from_hidden(call)
        num_targets = (call.targets_BT != IGNORE_INDEX).sum()
        count = call.num_items_in_batch
        loss = divide_by_count(total, num_targets.clamp(min=1) if count is None else count)
        return loss, {} if metrics is None else _sums(total, num_targets, metrics)

    def _from_hidden(self, call: _Call) -> tuple[Tensor, TokenMetrics | None]:
        if call.hidden_BTD is None or call.weight_VD is None or call.logits is None:
            raise RuntimeError(
                "the output head that patch_model prepared was not called; call patch_model again after "
                "replacing the head, and combine it with no other patch of the forward pass"
            )
        if call.weight_VD.untyped_storage().size() == 0:
            raise RuntimeError(
                "the output head frees its weight before the loss is computed: leave it to the FSDP unit of the whole "
                "model, or give its own unit reshard_after_forward=False; DeepSpeed ZeRO-3 is not supported"
            )
        # at every call, because the factor may change and an adapter may come to the head at any time
        if call.logits.shape != _known_shape(call.hidden_BTD, call.weight_VD):
            raise ValueError(UNKNOWN_CHANGE)
        if call.logits.requires_grad:  # the known numbers do not
            raise ValueError(LEARNED_CHANGE)
        scale = self._read_scale(call.logits, _known_numbers(call.hidden_BTD, call.weight_VD))
        hidden_BTD = call.hidden_BTD if scale == 1 else call.hidden_BTD * scale
        result: Any = linear_shaped_cross_entropy(
            hidden_BTD,
            call.weight_VD,
            call.targets_BT.to(hidden_BTD.device),
            self.shaping,
            _to_device(call.token_weights_BT, hidden_BTD.device),
            reduction="sum",
            implementation=self.implementation,
            generator=self.draws,
            logit_softcap=self.logit_softcap,
            z_loss=self.z_loss,
            chunk_rows=self.chunk_rows,
            return_metrics=cast(Any, self.wants_metrics),
        )
        return result if self.wants_metrics else (result, None)

    def _from_logits(self, call: _Call) -> tuple[Tensor, TokenMetrics | None]:
        logits = cast(Tensor, call.logits)
        result: Any = shaped_cross_entropy(
            logits,
            call.targets_BT.to(logits.device),
            self.shaping,
            _to_device(call.token_weights_BT, logits.device),
            reduction="sum",
            generator=self.draws,
            z_loss=self.z_loss,
            return_metrics=cast(Any, self.wants_metrics),
        )
        return result if self.wants_metrics else (result, None)

    def _read_scale(self, found: Tensor, known: Tensor) -> float:
        """Factor that the model multiplies its logits by, where that and its softcap are all it does to them."""
        cap = self.logit_softcap
        scale = float(found.flatten()[-1]) / PROBE_LIMIT if cap is None else 1.0
        expected = known * scale if cap is None else cap * torch.tanh(known / cap)
        # a few roundings of whatever dtype the model has made of the numbers
        tolerance = 8 * torch.finfo(found.dtype).eps
        if not torch.allclose(found.to(known.dtype), expected, rtol=tolerance, atol=tolerance):
            raise ValueError(UNKNOWN_CHANGE)
        return scale


class PatchedForward:
    """`model.forward` of a patched model; a plain object, so that a copy of the model has one of its own."""

    def __init__(self, model: nn.Module, loss: ModelLoss, *, eval_logits: bool) -> None:
        self.model = model
        self.loss = loss
        self.eval_logits = eval_logits
        self.original: Callable[..., Any] = model.forward
        self.was_replaced = "forward" in vars(model)

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's: Trainer and generate() read from it what the model takes."""
        return inspect.signature(self.original)

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        token_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            return self.original(*args, **kwargs)
        return_dict: bool | None = kwargs.pop("return_dict", None)
        if shift_labels is None and token_weights is not None:
            token_weights = shift_left(token_weights, 0)
        targets_BT = shift_left(cast(Tensor, labels), IGNORE_INDEX) if shift_labels is None else shift_labels
        wants_logits = self.eval_logits and not self.model.training
        call = _Call(targets_BT, token_weights, num_items_in_batch, wants_logits)
        self.loss.call = call
        try:
            outputs = self.original(*args, labels=targets_BT, return_dict=True, **kwargs)
        finally:
            self.loss.call = None
        return self._complete(outputs, call, return_dict)

    @outside_compiled_graphs  # in one piece, so that a compiled model has one graph
    def _complete(self, outputs: Any, call: _Call, return_dict: bool | None) -> Any:
        loss, sums = self.loss.compute(call)
        values = {**outputs, "loss": loss + outputs["loss"].to(loss.device)}
        if not call.wants_logits:
            del values["logits"]
        outputs = type(outputs)(**values)
        for name, value in sums.items():
            outputs[name] = value
        keeps_names = cast(Any, self.model).config.return_dict if return_dict is None else return_dict
        return outputs if keeps_names else outputs.to_tuple()

    def restore(self) -> None:
        """Give the model its forward pass back."""
        _restore(self.model, self.original, self.was_replaced)


class PatchedHead:
    """`forward` of the output head of a patched model."""

    def __init__(self, head: nn.Linear, loss: ModelLoss) -> None:
        self.head = head
        self.loss = loss
        self.original: Callable[..., Any] = head.forward
        self.was_replaced = "forward" in vars(head)

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        if self.loss.call is None or self.loss.call.wants_logits:
            return self.original(hidden_BTD)
        return self.loss.stand_in(hidden_BTD, self.head.weight)

    def restore(self) -> None:
        """Give the head its forward pass back."""
        _restore(self.head, self.original, self.was_replaced)


def _restore(module: nn.Module, original: Callable[..., Any], was_replaced: bool) -> None:
    if was_replaced:
        cast(Any, module).forward = original
    else:
        del cast(Any, module).forward


def _known_shape(hidden_BTD: Tensor, weight_VD: Tensor) -> tuple[int, ...]:
    return (*([1] * (hidden_BTD.ndim - 1)), weight_VD.shape[0])


def _known_numbers(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
    shape = _known_shape(hidden_BTD, weight_VD)
    row_V = torch.linspace(-PROBE_LIMIT, PROBE_LIMIT, shape[-1], dtype=dtype, device=hidden_BTD.device)
    return row_V.reshape(shape)


def _to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _sums(loss: Tensor, num_targets: Tensor, metrics: TokenMetrics) -> dict[str, Tensor]:
    return {
        "objective_sum": loss,
        "num_targets": num_targets,
        "cross_entropy_sum": metrics.cross_entropy.nansum(),
        "entropy_sum": metrics.entropy.nansum(),
        "head_mass_sum": metrics.head_mass.nansum(),
        "num_correct": (metrics.target_rank == 1).sum(),
    }
