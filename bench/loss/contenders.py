"""Ways to compute next-token losses on hidden states and an output weight, all as `(hidden, weight, targets) -> loss`.

Shape suffixes: N positions, R positions of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlprior.objectives import CrossEntropy, Objective, RewardShaping, linear_shaped_cross_entropy
from rlprior.objectives.linear import Implementation

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

PREFIXES: dict[Implementation, str] = {"chunked": "rlprior", "triton": "rlprior_triton"}
LABELS = {
    "plain": "`F.linear` + `F.cross_entropy`",
    "torch_linear_cross_entropy": "torch's `linear_cross_entropy`",
    "compiled_chunked": "compiled chunked cross-entropy",
    "liger": "Liger",
    "cut_cross_entropy": "cut-cross-entropy, exact",
    "cross_entropy": "`CrossEntropy()`",
    "beta": "`beta=-0.25`",
    "tail": "`tail_reward=-0.1`",
    "head": "`head_reward=0.1`",
    "tail_with_metrics": "`tail_reward=-0.1` and metrics",
}
CHOOSES_ITS_CHUNK = ("torch_linear_cross_entropy", "liger")

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
            loss, gradient_RV = _compiled_rows()(hidden_ND[chunk] @ weight_VD.t(), targets_N[chunk])
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


@cache
def _compiled_rows() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_evaluate_rows, dynamic=False)


def _evaluate_rows(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
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
    implementation: Implementation,
    rows: int | None = None,
    metrics: bool = False,
) -> Tensor:
    """This project's loss at a chunk size, or at the one that it chooses."""
    arguments = (hidden_ND, weight_VD, targets_N, shaping)
    options: Any = {"implementation": implementation, "chunk_rows": rows}
    if metrics:
        return linear_shaped_cross_entropy(*arguments, **options, return_metrics=True)[0]
    return linear_shaped_cross_entropy(*arguments, **options)


def liger(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, rows: int | None) -> Tensor:
    """Liger's fused loss at the chunk that it chooses, or at one of this many rows."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    budget = 1 if rows is None else find_liger_budget(rows, *hidden_ND.shape, weight_VD.shape[0])
    return liger_fused_linear_cross_entropy(hidden_ND, weight_VD, targets_N, chunk_mem_const=budget)


def find_liger_budget(rows: int, num_rows: int, width: int, vocabulary: int) -> int:
    """The `chunk_mem_const` C at which Liger takes chunks of this many rows.

    Liger derives them from shapes: the power of two from N / ceil(V / (C D)) on, and N at most.

    Raises:
        ValueError: there is none.
    """
    for budget in itertools.count(1):
        num_chunks = -(-vocabulary // (budget * width))
        chunk = min(1 << (-(-num_rows // num_chunks) - 1).bit_length(), num_rows)
        if chunk == rows:
            return budget
        if chunk > rows or num_chunks == 1:
            raise ValueError(f"Liger takes no chunks of {rows} rows at this size")
    raise AssertionError


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
    for implementation in ("chunked",) if device == "cpu" else ("chunked", "triton"):
        prefix = PREFIXES[implementation]
        if implementation == "triton" and importlib.util.find_spec("triton") is None:
            missing[f"{prefix}_cross_entropy"] = "triton is not installed"
            continue
        for name, shaping in SHAPINGS.items():
            own = partial(shaped, shaping=shaping, implementation=implementation)
            found[f"{prefix}_{name}"] = own
            if device != "cpu":  # where the others are matched too
                found |= {f"{prefix}_{name}[{rows}]": partial(own, rows=rows) for rows in chunk_sizes}
        found[f"{prefix}_tail_with_metrics"] = partial(
            shaped, shaping=SHAPINGS["tail"], implementation=implementation, metrics=True
        )
    return found, missing


def label(name: str) -> str:
    """A contender's name for a reader."""
    base, _, rows = name.removesuffix("]").partition("[")
    text = LABELS.get(base, "")
    for prefix, owner in (("rlprior_triton_", "rlprior, triton, "), ("rlprior_", "rlprior, ")):
        if not text and base.startswith(prefix):
            text = owner + LABELS[base.removeprefix(prefix)]
    if rows:
        return f"{text}, chunks of {rows}"
    return f"{text}, the chunk that it chooses" if base in CHOOSES_ITS_CHUNK else text
