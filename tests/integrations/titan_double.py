"""torchtitan's loss contract in small, for machines that do not have it: one device, nothing compiled, plain tensors.

Written from `torchtitan/components/loss.py` and `torchtitan/config/configurable.py` of torchtitan 0.3.0, [B, T] positions: a component has a
keyword-only slotted `Config` whose `build` makes it; a loss takes `(pred, labels, global_valid_tokens)` and returns
`(loss, metrics)`; the chunked wrapper runs head and loss on equal parts of the positions, each with its own backward pass,
and returns a loss whose gradient with respect to the hidden states is the parts' put together.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlprior.integrations import torchtitan


class Configurable:
    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[Any] = None

        def build(self, **kwargs: Any) -> Any:
            assert not {field.name for field in fields(self)} & kwargs.keys()
            return self._owner(config=replace(self), **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config: Any = cls.__dict__.get("Config")
        if config is not None:
            if "__slots__" not in config.__dict__ or not all(field.kw_only for field in fields(config)):
                raise TypeError(f"{cls.__name__}.Config must be a keyword-only dataclass with slots")
            config._owner = cls


class BaseLoss(ABC, Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass

    @abstractmethod
    def __init__(self, config: Any, *, compile_config: Any = None) -> None: ...

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.fn(pred, labels)  # type: ignore[attr-defined]
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


class CrossEntropyLoss(BaseLoss):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self.fn = lambda pred, labels: F.cross_entropy(
            pred.float().flatten(0, 1), labels.flatten(0, 1), reduction="sum", ignore_index=-100
        )


class ChunkedLossWrapper(BaseLoss):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        num_chunks: int = 8
        loss_fn: BaseLoss.Config = field(default_factory=CrossEntropyLoss.Config)

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self.num_chunks = config.num_chunks
        self.loss_fn = config.loss_fn.build(compile_config=compile_config)
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.lm_head is not None
        assert pred.shape[1] % self.num_chunks == 0
        total, parts = pred.new_zeros((), dtype=torch.float32), []
        for hidden, part_labels in zip(
            pred.chunk(self.num_chunks, dim=1), labels.chunk(self.num_chunks, dim=1), strict=True
        ):
            leaf = hidden.detach().requires_grad_(pred.requires_grad)
            loss, metrics = self.loss_fn(self.lm_head(leaf), part_labels, global_valid_tokens, **loss_inputs)
            assert metrics == {}
            if pred.requires_grad:
                loss.backward()
                parts.append(leaf.grad)
            total = total + loss.detach()
        return (_GivenGradient.apply(pred, torch.cat(parts, dim=1), total) if parts else total), {}  # type: ignore[return-value]


class _GivenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0], None, None


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import torchtitan.components.loss` find these classes for the length of a test."""
    modules = {
        name: ModuleType(name)
        for name in ("torchtitan", "torchtitan.components", "torchtitan.components.loss")
    }
    for thing in (BaseLoss, CrossEntropyLoss, ChunkedLossWrapper):
        setattr(modules["torchtitan.components.loss"], thing.__name__, thing)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@contextmanager
def torchtitan_losses() -> Iterator[Any]:
    """torchtitan's loss module where it is installed, and this double of it elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchtitan") is None:
            install(patch)
        torchtitan._loss_class.cache_clear()
        yield importlib.import_module("torchtitan.components.loss")
        torchtitan._loss_class.cache_clear()
