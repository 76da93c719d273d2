"""Ways to compute next-token losses on hidden states and an output weight, all as `(hidden, weight, targets) -> loss`.

Shape suffixes: N positions, R positions of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlprior.objectives import CrossEntropy, Objective, RewardShaping, linear_shaped_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

SHAPINGS: dict[str, Objective] = {
    "cross_entropy": CrossEntropy(),
    "beta": RewardShaping(beta=-0.25),
    "tail": RewardShaping(tail_reward=-0.1, top_k=100),
    "head": RewardShaping(head_reward=0.1, top_k=100),
}


def plain(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """What most trainers do."""
    return functional.cross_entropy(functional.linear(hidden_ND, weight_VD).float(), targets_N)


def torch_chunked(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, rows: int | None) -> Tensor:
    """torch's own fused loss at a chunk size, or at the one that it chooses."""
    options = (
        nn.LinearCrossEntropyOptions()
        if rows is None
        else nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    )
    return functional.linear_cross_entropy(hidden_ND, weight_VD, targets_N, options=options)


class _CompiledChunks(torch.autograd.Function):
    """Cross-entropy by chunks whose elementwise part torch.compile has fused; gradients in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int) -> Tensor:
        hidden_gradient = torch.empty_like(hidden_ND)
        weight_gradient = torch.zeros_like(weight_VD, dtype=torch.float32)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets_N), rows):
            chunk = slice(start, start + rows)
            loss, gradient_RV = _compiled_rows(hidden_ND[chunk] @ weight_VD.t(), targets_N[chunk])
            total += loss
            torch.mm(gradient_RV, weight_VD, out=hidden_gradient[chunk])
            weight_gradient.addmm_(
                gradient_RV.t(), hidden_ND[chunk]
            ) if weight_VD.dtype == torch.float32 else (
                weight_gradient.add_(gradient_RV.t() @ hidden_ND[chunk])
            )
        ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight_VD.dtype))
        ctx.count = len(targets_N)
        return total / len(targets_N)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * (upstream / ctx.count) for gradient in ctx.saved_tensors), None, None


@partial(torch.compile, dynamic=False)
def _compiled_rows(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    shifted_RV = logits_RV.float() - logits_RV.float().amax(1, keepdim=True)
    log_total_R1 = shifted_RV.exp().sum(1, keepdim=True).log()
    loss = (log_total_R1 - shifted_RV.gather(1, targets_R[:, None])).sum()
    is_target_RV = torch.arange(logits_RV.shape[1], device=logits_RV.device) == targets_R[:, None]
    gradient_RV = (shifted_RV - log_total_R1).exp() - is_target_RV.float()
    return loss, gradient_RV.to(logits_RV.dtype)


def compiled_chunked(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, rows: int) -> Tensor:
    """A chunked cross-entropy whose elementwise part is compiled."""
    return _CompiledChunks.apply(hidden_ND, weight_VD, targets_N, rows)


def shaped(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    shaping: Objective,
    rows: int | None = None,
    metrics: bool = False,
) -> Tensor:
    """This project's loss."""
    if metrics:
        return linear_shaped_cross_entropy(
            hidden_ND, weight_VD, targets_N, shaping, chunk_rows=rows, return_metrics=True
        )[0]
    return linear_shaped_cross_entropy(hidden_ND, weight_VD, targets_N, shaping, chunk_rows=rows)


def liger(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, rows: int | None) -> Tensor:
    """Liger's fused loss; `rows` in place of the chunk that it chooses."""
    from liger_kernel.ops import fused_linear_cross_entropy as ops

    if rows is None:
        return ops.LigerFusedLinearCrossEntropyFunction.apply(hidden_ND, weight_VD, targets_N)[0]
    return _liger_at(ops, rows, hidden_ND, weight_VD, targets_N)


def _liger_at(ops: Any, rows: int, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    # Liger derives its chunk from shapes alone: next_power_of_2(ceil(N / ceil(V / D))).
    exact, ops.triton = ops.triton, _ChunkOf(ops.triton, rows)
    try:
        return ops.LigerFusedLinearCrossEntropyFunction.apply(hidden_ND, weight_VD, targets_N)[0]
    finally:
        ops.triton = exact


class _ChunkOf:
    """The triton module with another answer to Liger's question for its chunk; its block sizes keep theirs."""

    def __init__(self, triton: Any, rows: int) -> None:
        self._triton, self._rows, self._is_first = triton, rows, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._triton, name)

    def next_power_of_2(self, value: int) -> int:
        if self._is_first:
            self._is_first = False
            return self._rows
        return self._triton.next_power_of_2(value)


def cut_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Apple's cut-cross-entropy, exact: without its gradient filter."""
    import cut_cross_entropy as package

    return package.linear_cross_entropy(hidden_ND, weight_VD, targets_N, impl="cce_exact")


def find_contenders(device: str, chunk_sizes: list[int]) -> tuple[dict[str, Loss], dict[str, str]]:
    """The contenders by name, and why others cannot run here."""
    found: dict[str, Loss] = {"plain": plain}
    missing: dict[str, str] = {}
    if hasattr(functional, "linear_cross_entropy"):
        found["torch_linear_cross_entropy"] = partial(torch_chunked, rows=None)
        found |= {
            f"torch_linear_cross_entropy[{rows}]": partial(torch_chunked, rows=rows) for rows in chunk_sizes
        }
    else:
        missing["torch_linear_cross_entropy"] = f"torch {torch.__version__} has none"
    found |= {f"compiled_chunked[{rows}]": partial(compiled_chunked, rows=rows) for rows in chunk_sizes}
    for name, package in (("liger", "liger_kernel"), ("cut_cross_entropy", "cut_cross_entropy")):
        if device == "cpu":
            missing[name] = "runs on GPUs only"
        elif importlib.util.find_spec(package) is None:
            missing[name] = f"{package} is not installed"
        elif name == "liger":
            found["liger"] = partial(liger, rows=None)
            found |= {f"liger[{rows}]": partial(liger, rows=rows) for rows in chunk_sizes}
        else:
            found["cut_cross_entropy"] = cut_cross_entropy
    for name, shaping in SHAPINGS.items():
        found[f"rlprior_{name}"] = partial(shaped, shaping=shaping)
    found["rlprior_tail_with_metrics"] = partial(shaped, shaping=SHAPINGS["tail"], metrics=True)
    return found, missing
