"""Float32 gradients within 1e-5 of the exact ones, on inputs made to mislead: what the losses promise, in one test.

Each tensor's error is the norm of the difference over the norm of the exact gradient. That is computed by the definitions in
decimals of 150 digits: where a target is certain, probabilities cancel in float64 too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext

import pytest
import torch
from tests.objectives.conftest import ON_CPU, Inputs, oracle_negative_rewards
from torch import Tensor

from rlprior.objectives import (
    CrossEntropy,
    DynamicFineTuning,
    Focal,
    LabelSmoothing,
    Objective,
    RewardShaping,
    linear_shaped_cross_entropy,
    selection,
)

TOLERANCE = 1e-5
TINY = torch.finfo(torch.float32).tiny
V = 307  # prime: neither the 2 columns of a block of the generic code nor the 32 of the kernels divide it
TOP_K = 17


@dataclass(frozen=True)
class Family:
    """One problem, float32; `num_excluded` more columns of -inf, and memory that holds nan, come on top of it."""

    inputs: Inputs
    top_k: int = TOP_K
    num_excluded: int = 0
    is_strided: bool = False
    is_poisoned: bool = False


def random(n: int = 5, v: int = V, seed: int = 0, scale: float = 0.5) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 16, generator=generator)
    weight = torch.randn(v, 16, generator=generator) * scale
    targets = torch.randint(v, (n,), generator=generator)
    return Inputs(hidden, weight, targets, torch.rand(n, generator=generator) + 0.5)


def at_ranks(inputs: Inputs, ranks: tuple[int, ...]) -> Inputs:
    """The same with targets that have these ranks among the logits."""
    order = inputs.logits.argsort(dim=1, descending=True, stable=True)
    return replace(inputs, targets=torch.tensor([order[row, rank - 1] for row, rank in enumerate(ranks)]))


def ties() -> Inputs:
    """Exact logits of few sizes: dozens of columns tie with the k-th, in more blocks than are selected."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randint(-2, 3, (5, 16), generator=generator).float()
    weight = torch.randint(-1, 2, (V, 16), generator=generator).float() / 4
    return at_ranks(replace(random(), hidden=hidden, weight=weight), (1, TOP_K, TOP_K + 1, 200, V))


def all_equal() -> Inputs:
    """Equal logits of tokens that differ."""
    inputs = random()
    inputs.hidden[:, 1:] = 0
    inputs.weight[:, 0] = 1
    return inputs


def margin(size: float) -> Inputs:
    """Exact logits whose target is this much above the largest other."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-64, 65, (97, 5), generator=generator).float() / 32
    targets = 7 * torch.arange(5)
    for row, target in enumerate(targets):
        weight[target, row] = weight[:, row].max() + size
    return Inputs(torch.eye(5), weight, targets, torch.ones(5))


def ignoring_all() -> Inputs:
    return replace(random(), targets=torch.full((5,), -100))


FAMILIES: dict[str, Callable[[], Family]] = {
    "random": lambda: Family(random()),
    "sharp": lambda: Family(at_ranks(random(scale=3.0), (1, 1, 2, 3, V))),
    "ties across blocks that are not selected": lambda: Family(ties()),
    "all logits equal": lambda: Family(all_equal()),
    "targets of rank 1, k, k + 1": lambda: Family(at_ranks(random(), (1, TOP_K, TOP_K + 1, TOP_K - 1, V))),
    "columns of -inf": lambda: Family(random(), num_excluded=35),
    "fewer finite columns than k": lambda: Family(random(v=11), num_excluded=40),
    "k = V - 1": lambda: Family(random(v=13), top_k=12),
    "k = V": lambda: Family(random(v=13), top_k=13),
    "k > V": lambda: Family(random(v=13), top_k=20),
    "k = 1": lambda: Family(random(), top_k=1),
    "two tokens": lambda: Family(random(v=2), top_k=1),
    "one position": lambda: Family(random(n=1)),
    "all ignored": lambda: Family(ignoring_all()),
    "strides": lambda: Family(random(), is_strided=True),
    "poisoned buffers": lambda: Family(random(), is_poisoned=True),
    **{
        f"margin {size}": lambda size=size: Family(margin(size), top_k=9)
        for size in (-110, -90, -5, 0, 5, 10, 20, 40, 60, 80, 86, 90, 110)
    },
}


def objectives(top_k: int, implementation: str) -> tuple[Objective, ...]:
    """All that differ to an implementation: the kernels know an objective by its head and its shift alone."""
    in_kernels = (
        CrossEntropy(),
        RewardShaping(beta=-0.9, head_reward=0.3, tail_reward=-3.0, top_k=top_k),
        RewardShaping(head_reward=1.0, tail_reward=0.5, top_k=top_k),  # the reward of a certain target
        LabelSmoothing(smoothing=0.1),
    )
    if implementation == "triton":
        return in_kernels
    return (
        *in_kernels,
        RewardShaping(beta=-0.25),
        RewardShaping(beta=0.5),
        RewardShaping(tail_reward=-0.1, top_k=top_k),
        RewardShaping(head_reward=0.1, top_k=top_k),
        RewardShaping(head_reward=1.0, tail_reward=1.0, top_k=top_k),
        Focal(gamma=2.0),
        DynamicFineTuning(),
    )


def exact_row(objective: Objective, logits: list[float], target: int) -> list[float]:
    """Gradient of the logits: every loss is -sum_a c_a log p_a with constants c, and dL/dz_j = p_j sum_a c_a - c_j."""
    with localcontext() as context:
        context.prec = 150
        p = [(Decimal(z) - Decimal(max(logits))).exp() for z in logits]
        p = [mass / sum(p) for mass in p]
        p_x, q = p[target], sum(p[:target] + p[target + 1 :])
        c = [Decimal(0)] * len(p)
        if isinstance(objective, LabelSmoothing):
            c = [Decimal(objective.smoothing) / len(p)] * len(p)
            c[target] += 1 - Decimal(objective.smoothing)
        elif isinstance(objective, RewardShaping):
            rewards = oracle_negative_rewards(objective, logits)
            c = [Decimal(reward) * mass for reward, mass in zip(rewards, p, strict=True)]
            c[target] = (p_x.ln() * (1 - q ** Decimal(objective.beta))).exp()
        elif isinstance(objective, Focal):  # whose factor is differentiated too
            gamma = Decimal(objective.gamma)
            c[target] = q**gamma - gamma * q ** (gamma - 1) * p_x * p_x.ln()
        else:
            c[target] = p_x if isinstance(objective, DynamicFineTuning) else Decimal(1)
        total = sum(c)
        return [float(mass * total - own) for mass, own in zip(p, c, strict=True)]


@functools.cache
def exact_gradients(name: str, objective: Objective) -> tuple[Tensor, Tensor]:
    inputs = FAMILIES[name]().inputs.to(torch.float64)
    rows = [
        exact_row(objective, logits, target) if target != -100 else [0.0] * len(logits)
        for logits, target in zip(inputs.logits.tolist(), inputs.targets.tolist(), strict=True)
    ]
    gradient = torch.tensor(rows, dtype=torch.float64) * inputs.token_weights.double()[:, None]
    return gradient @ inputs.weight, gradient.T @ inputs.hidden


@pytest.fixture
def blocks_of_any_vocabulary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The two-level selection, which large vocabularies take; and an end to poisoned memory."""
    monkeypatch.setattr(selection, "MIN_TWO_LEVEL_VOCABULARY", 0)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(family: Family, objective: Objective, implementation: str) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, those of what stands for -inf left out after they were found to be 0."""
    inputs, n = family.inputs, family.num_excluded
    # One hidden unit of 1e30 meets -1e30 in the excluded columns and 0 in the others.
    hidden = torch.cat([inputs.hidden, torch.full((len(inputs.hidden), 1), 1e30)], dim=1)
    weight = torch.nn.functional.pad(inputs.weight, (0, 1, 0, n))
    weight[len(inputs.weight) :, -1] = -1e30
    targets, token_weights = inputs.targets, inputs.token_weights
    if family.is_strided:
        hidden, weight = hidden.T.contiguous().T, weight.repeat_interleave(2, dim=1)[:, ::2]
        targets, token_weights = (
            torch.stack([tensor] * 2, dim=1)[:, 0] for tensor in (targets, token_weights)
        )
        assert not any(tensor.is_contiguous() for tensor in (hidden, weight, targets, token_weights))
    if family.is_poisoned:
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_shaped_cross_entropy(
        hidden, weight, targets, objective, token_weights, implementation=implementation, reduction="sum"
    )
    loss.backward()
    assert (weight.grad[len(inputs.weight) :] == 0).all()
    return hidden.grad[:, :-1], weight.grad[: len(inputs.weight), :-1]


# The kernels hand every margin to the same formulas: a few of them will do.
CASES = [("chunked", name) for name in FAMILIES] + [
    ("triton", name)
    for name in FAMILIES
    if "triton" in ON_CPU
    and (not name.startswith("margin") or name.split()[1] in ("-110", "-5", "20", "86", "110"))
]


@pytest.mark.parametrize(("implementation", "name"), CASES)
def test_float32_gradients_are_exact_to_1e_5(blocks_of_any_vocabulary: None, implementation: str, name: str):
    family = FAMILIES[name]()
    for objective in objectives(family.top_k, implementation):
        found, expected = gradients(family, objective, implementation), exact_gradients(name, objective)
        for what, actual, exact in zip(("hidden", "weight"), found, expected, strict=True):
            size, error = float(exact.norm()), float((actual.double() - exact).norm())
            if size < TINY:  # float32 has no relative precision there: as small will do
                assert float(actual.double().norm()) <= TINY, (objective, what)
            else:
                assert error <= TOLERANCE * size, f"{objective}, gradient of {what}: {error / size:.1e}"
