"""Linear layers multiplied by oneDNN, on processors where PyTorch's own library leaves half of the speed unused.

PyTorch multiplies float32 matrices with MKL, which keeps to 256-bit instructions on AMD's processors; oneDNN, part of PyTorch as well, uses
all 512 bits, at the same precision. Measured on an AMD EPYC with one thread: 95 against 190-215 GFLOP/s in the products of a layer.

Shape suffixes: N positions, D inputs, F outputs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable


@functools.cache
def is_onednn_faster() -> bool:
    """Whether this is a processor of AMD's with 512-bit instructions, under a PyTorch that has both libraries."""
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return is_amd and has_both and torch.backends.cpu.get_cpu_capability() == "AVX512"


def multiply_with_onednn(model: Any) -> None:
    """Have oneDNN compute the products of every linear layer of a float32 model on a CPU, forward and backward.

    Without gradients and with few rows, as at the end of sampling, the layers are as before: setting up costs more there. So they are in
    other dtypes and under autocast. The output head keeps its own: the loss reads its weight. The weights and their names stay as they are.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.forward = functools.partial(_forward, module)


@contextlib.contextmanager
def multiplying_with_onednn(model: Any) -> Iterator[None]:
    """The same within the context only, the output head included, where `is_onednn_faster`."""
    layers = [
        m for m in model.modules() if type(m) is nn.Linear and m.weight.is_cpu and "forward" not in vars(m)
    ]
    layers = layers if is_onednn_faster() else []
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


MIN_ROWS_WITHOUT_GRADIENT = 32
"""Rows from which oneDNN is faster at nearly all widths: 8 rows of 128 by 128 take 2.8 times as long as MKL's, 32 rows of 128 by 352 0.8 times."""


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    is_float32 = input.dtype == layer.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (is_float32 and input.is_cpu and input.numel()):
        return nn.functional.linear(input, layer.weight, layer.bias)
    if not torch.is_grad_enabled():
        if input.numel() < MIN_ROWS_WITHOUT_GRADIENT * layer.in_features:
            return nn.functional.linear(input, layer.weight, layer.bias)
        return torch.ops.mkldnn._linear_pointwise(input, layer.weight, layer.bias, "none", [], "")
    flat_ND = input.reshape(-1, layer.in_features)
    apply = cast(Any, _Product).apply
    output_NF: Tensor = apply(flat_ND, layer.weight)
    if layer.bias is not None:
        output_NF = output_NF + layer.bias
    return output_NF.view(*input.shape[:-1], layer.out_features)


def _multiply(left_ND: Tensor, right_FD: Tensor) -> Tensor:
    """`left @ right.T`."""
    return torch.ops.mkldnn._linear_pointwise(left_ND, right_FD, None, "none", [], "")


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, inputs_ND: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.save_for_backward(inputs_ND, weight_FD)
        return _multiply(inputs_ND, weight_FD)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        inputs_ND, weight_FD = ctx.saved_tensors
        gradient_NF = upstream[0]
        wants_inputs, wants_weight = ctx.needs_input_grad
        return (
            _multiply(gradient_NF, weight_FD.t()) if wants_inputs else None,
            _multiply(gradient_NF.t(), inputs_ND.t()) if wants_weight else None,
        )
