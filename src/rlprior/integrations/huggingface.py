"""Hugging Face models: the loss from logits for a Trainer, and a model that returns it without computing logits.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from rlprior.integrations.next_token import IGNORE_INDEX, divide_by_count, shift_left, start_draws
from rlprior.integrations.patched import ModelLoss, PatchedForward, PatchedHead
from rlprior.objectives import Objective, shaped_cross_entropy
from rlprior.objectives.linear import Implementation


def shaped_loss(
    shaping: Objective, *, z_loss: float = 0.0, router_aux_loss_coef: float | None = None
) -> Callable[..., Tensor]:
    """A `compute_loss_func` for `transformers.Trainer`: the loss of the model's logits.

    The function takes `(outputs, labels, num_items_in_batch=None)`, shifts the labels, and divides the summed loss by
    `num_items_in_batch`, or by the number of its own targets where there is none.

    Args:
        shaping: settings of any objective.
        z_loss: as in `shaped_cross_entropy`.
        router_aux_loss_coef: factor of the `aux_loss` of a mixture of experts, which a Trainer leaves out where it is
            given a loss function; needed where the model returns one.

    Raises:
        ValueError: not the settings of an objective; in the function: no labels, or a router loss without its factor.
    """
    draws = start_draws(shaping)

    def compute_loss(
        outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if labels is None:
            raise ValueError("shaped_loss got no labels: the batches need a 'labels' entry")
        is_mapping = isinstance(outputs, dict)
        logits = outputs["logits"] if is_mapping else outputs[0]
        loss = shaped_cross_entropy(
            logits,
            shift_left(labels.to(logits.device), IGNORE_INDEX),
            shaping,
            reduction="mean" if num_items_in_batch is None else "sum",
            generator=draws,
            z_loss=z_loss,
        )
        if num_items_in_batch is not None:
            loss = divide_by_count(loss, num_items_in_batch)
        router_loss = outputs.get("aux_loss") if is_mapping else None
        if router_loss is None:
            return loss
        if router_aux_loss_coef is None:
            raise ValueError(
                "the model returned a router loss: say shaped_loss(..., router_aux_loss_coef="
                "model.config.router_aux_loss_coef), or 0 to train without it"
            )
        return loss + router_aux_loss_coef * router_loss.to(loss.device)

    return compute_loss


def patch_model(
    model: nn.Module,
    shaping: Objective,
    *,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    implementation: Implementation = "auto",
    metrics: bool = False,
    eval_logits: bool = True,
) -> None:
    """Make `model(input_ids, labels=...)` return the shaped loss without computing logits.

    With labels the model then also takes `shift_labels` [B, T] (labels that are aligned already, in place of `labels`),
    `num_items_in_batch` (divide the summed loss by it; otherwise by the number of targets) and `token_weights` [B, T]
    (constant factors, aligned with the labels). Without labels it does what it did. A second call replaces the settings.

    Args:
        model: causal language model of transformers whose output head is a linear layer without bias; not yet wrapped
            (PEFT: its `get_base_model()`).
        shaping: settings of any objective.
        z_loss, chunk_rows, implementation: as in `linear_shaped_cross_entropy`. The logit softcap and scale are the model's.
        metrics: outputs with labels gain `objective_sum` (what `loss` divides, in the graph), and detached
            `num_targets`, `cross_entropy_sum`, `entropy_sum`, `head_mass_sum` and `num_correct` (targets of rank 1).
        eval_logits: in eval mode return the logits along with the loss, for a Trainer's `compute_metrics`.

    Raises:
        ValueError: a model, shaping or option that this cannot serve.
    """
    unpatch_model(model)
    head = _require_head(model)
    loss = ModelLoss(shaping, z_loss, chunk_rows, implementation, metrics, _softcap_of(model))
    forward = PatchedForward(model, loss, eval_logits=eval_logits)
    head_forward = PatchedHead(head, loss)
    parts: Any = model  # transformers has setters that nn.Module does not declare
    parts.loss_function = loss
    parts.forward = forward
    parts.accepts_loss_kwargs = True  # some models say no, and a Trainer then averages over micro-batches
    cast(Any, head).forward = head_forward


def unpatch_model(model: nn.Module) -> None:
    """Take `patch_model` back; nothing happens to a model that is not patched.

    Raises:
        RuntimeError: `model.forward` was replaced since.
    """
    loss = vars(model).get("_loss_function")
    if not isinstance(loss, ModelLoss):
        return
    if not isinstance(vars(model).get("forward"), PatchedForward):
        raise RuntimeError(
            "model.forward was replaced since patch_model; take that back first "
            "(accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, PatchedForward | PatchedHead) and forward.loss is loss:
            forward.restore()
    del cast(Any, model)._loss_function, cast(Any, model).accepts_loss_kwargs


def _require_head(model: nn.Module) -> nn.Linear:
    """The output head, after model and head were found to be what `patch_model` can serve."""
    name = type(model).__name__
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    own_loss = getattr(model, "loss_function", None)
    is_causal = getattr(own_loss, "__name__", None) == "ForCausalLMLoss"
    config = getattr(model, "config", None)
    if code is None or "loss_function" not in code.co_names or not is_causal or config is None:
        raise ValueError(
            f"patch_model needs a causal language model of transformers that calls its loss_function, and {name} is none; "
            "where it wraps one, pass the model inside"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"patch_model shifts labels by one, and the labels of an encoder-decoder ({name}) are not shifted"
        )
    head = cast(Any, model).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        kind = (
            "no output head"
            if head is None
            else f"a {type(head).__module__}.{type(head).__name__} as its head"
        )
        raise ValueError(
            f"patch_model needs a linear output head, and {name} has {kind}; use compute_loss_func=shaped_loss(...)"
        )
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        raise ValueError(
            f"the output head of {name} ({type(head).__module__}.{type(head).__name__}) has a forward pass of its own, which "
            "patch_model would leave out (hooks of accelerate: remove_hook_from_module); use compute_loss_func=shaped_loss(...)"
        )
    if cast(Tensor | None, head.bias) is not None or not head.weight.is_floating_point():
        kind = "bias" if head.weight.is_floating_point() else f"{head.weight.dtype} weights"
        raise ValueError(
            f"the output head of {name} has {kind}, which patch_model does not support; "
            "use compute_loss_func=shaped_loss(...)"
        )
    return head


def _softcap_of(model: nn.Module) -> float | None:
    return getattr(cast(Any, model).config.get_text_config(), "final_logit_softcapping", None)
