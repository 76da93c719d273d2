"""An oracle for every objective, written from the definitions without any of the package's formulas, and the cases it runs on."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprior.objectives import (
    IMPLEMENTATIONS,
    OBJECTIVES,
    CrossEntropy,
    DynamicFineTuning,
    Focal,
    LabelSmoothing,
    Objective,
    RewardShaping,
    SampledReward,
    TokenMetrics,
    linear_shaped_cross_entropy,
    shaped_cross_entropy,
)

CASES: dict[str, tuple[Objective, ...]] = {
    "cross_entropy": (CrossEntropy(),),
    "reward_shaping": (
        RewardShaping(),
        RewardShaping(beta=-0.25),
        RewardShaping(beta=0.5),
        RewardShaping(tail_reward=-0.1, top_k=5),
        RewardShaping(head_reward=0.1, top_k=5),
        RewardShaping(beta=-0.9, head_reward=-0.3, tail_reward=0.2, top_k=3),
        RewardShaping(beta=0.5, head_reward=0.4, tail_reward=-30.0, top_k=1),  # a negative expected reward
        RewardShaping(head_reward=0.2, tail_reward=0.2, top_k=5),
        RewardShaping(head_reward=0.2, tail_reward=-0.2, top_k=1000),  # everything is head
    ),
    "label_smoothing": (LabelSmoothing(smoothing=0.0), LabelSmoothing(smoothing=0.1)),
    "focal": (Focal(gamma=0.0), Focal(gamma=0.5), Focal(gamma=2.0)),
    "dynamic_fine_tuning": (DynamicFineTuning(),),
    "sampled_reward": (
        SampledReward(beta=-0.25, head_reward=0.1, tail_reward=-0.1, top_k=5, num_samples=3, seed=1),
        SampledReward(beta=0.5, head_reward=0.3, tail_reward=0.3, seed=2),
    ),
}

PATHS = ("logits", *(name for name in IMPLEMENTATIONS if name != "triton"))
"""Every way to a loss that takes float64: from given logits, and each implementation on hidden states but the kernels,
which have tests of their own."""


ON_CPU = tuple(name for name in IMPLEMENTATIONS if name != "triton" or not torch.cuda.is_available())
"""Implementations that take tensors on a CPU: all, for Triton's interpreter runs the kernels where there is no GPU."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "objective" in metafunc.fixturenames:
        # A name without a case is a parameter too: the fixture below makes it fail.
        named = [(name, settings) for name in OBJECTIVES for settings in CASES.get(name, (None,))]
        ids = [f"{name}-{index}" for index, (name, _) in enumerate(named)]
        metafunc.parametrize("objective", named, ids=ids, indirect=True)
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", PATHS)


@pytest.fixture
def objective(request: pytest.FixtureRequest) -> Objective:
    name, settings = request.param
    assert settings is not None, f"objective {name!r} is registered but has no test case in CASES"
    return settings


@dataclass(frozen=True)
class Inputs:
    """One problem; `hidden @ weight.T` are its logits."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    token_weights: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.hidden.to(dtype), self.weight.to(dtype), self.targets, self.token_weights)

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T


@dataclass(frozen=True)
class Outcome:
    loss: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor
    metrics: TokenMetrics | None = None


def make_inputs(seed: int = 0, n: int = 23, v: int = 37, d: int = 5, scale: float = 1.0) -> Inputs:
    """Random float64 problem: some targets ignored, some weights 0, some rows peaked, some targets unlikely."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight = normal(n, d) * scale, normal(v, d)
    hidden[::5] *= 4
    targets = torch.randint(v, (n,), generator=generator)
    targets[1::4] = (hidden @ weight.T).argmax(1)[1::4]
    targets[3::7] = -100
    token_weights = torch.rand(n, dtype=torch.float64, generator=generator) * 2
    token_weights[2::9] = 0
    return Inputs(hidden, weight, targets, token_weights)


def oracle_row(objective: Objective, logits: Tensor, target: int, uniforms: list[float]) -> Tensor:
    """Surrogate loss of one row whose derivative is the objective's gradient."""
    log_p = logits - logits.logsumexp(0)
    p = log_p.detach().exp()  # .detach() is the stop-gradient throughout
    finite = [j for j, z in enumerate(logits.tolist()) if z != -torch.inf]
    others = [j for j in finite if j != target]
    if isinstance(objective, CrossEntropy):
        return -log_p[target]
    if isinstance(objective, DynamicFineTuning):
        return -p[target] * log_p[target]
    if isinstance(objective, LabelSmoothing):
        uniform = sum(-log_p[j] for j in finite) / len(finite)
        return (1 - objective.smoothing) * -log_p[target] + objective.smoothing * uniform
    log_q = log_p[others].logsumexp(0)
    if isinstance(objective, Focal):
        return -torch.exp(objective.gamma * log_q) * log_p[target]
    # Eq. 11, in logarithms: 1/p itself overflows for tokens that are as good as impossible.
    q = float(log_q.detach().exp())
    log_reward = -(q**objective.beta) * log_p[target].detach() if q > 0 else torch.zeros_like(log_p[target])
    rewards = oracle_negative_rewards(objective, logits.tolist())
    total = torch.zeros_like(log_p[target])
    if isinstance(objective, RewardShaping):
        for j in others:
            total = total - p[j] * rewards[j] * log_p[j]
        return total - torch.exp(log_p[target].detach() + log_reward) * log_p[target]
    assert isinstance(objective, SampledReward)
    cumulative = list(itertools.accumulate(p.tolist()))
    for uniform in uniforms:
        drawn = bisect.bisect_right(cumulative, uniform * cumulative[-1])
        total = total - (log_reward.exp() if drawn == target else rewards[drawn]) * log_p[drawn]
    return total / len(uniforms)


def oracle_negative_rewards(objective: RewardShaping | SampledReward, logits: list[float]) -> list[float]:
    """Eq. 12; K is the k largest finite logits and all that tie with the last of them."""
    ranked = sorted((z for z in logits if z != -torch.inf), reverse=True)
    last = ranked[min(objective.top_k, len(ranked)) - 1]
    return [objective.head_reward if z >= last else objective.tail_reward for z in logits]


def oracle_uniforms(objective: Objective, n: int) -> list[list[float]]:
    if not isinstance(objective, SampledReward):
        return [[] for _ in range(n)]
    generator = torch.Generator().manual_seed(objective.seed)
    return torch.rand(n, objective.num_samples, dtype=torch.float64, generator=generator).tolist()


def oracle(
    objective: Objective,
    inputs: Inputs,
    reduction: str,
    upstream: Tensor | float,
    *,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
) -> Outcome:
    """Loss and gradients in float64, from autograd on the definitions."""
    hidden = inputs.hidden.double().detach().requires_grad_()
    weight = inputs.weight.double().detach().requires_grad_()
    logits = hidden @ weight.T
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    uniforms = oracle_uniforms(objective, len(logits))
    rows = []
    for index, target in enumerate(inputs.targets.tolist()):
        if target == -100:
            rows.append(torch.zeros((), dtype=torch.float64))
            continue
        row = oracle_row(objective, logits[index], target, uniforms[index])
        row = row + z_loss * logits[index].logsumexp(0) ** 2
        rows.append(row * inputs.token_weights[index])
    loss = torch.stack(rows)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / int((inputs.targets != -100).sum())
    (loss * upstream).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Outcome(loss.detach(), hidden.grad, weight.grad)


def compute(
    path: str,
    objective: Objective,
    inputs: Inputs,
    reduction: str,
    upstream: Tensor | float = 1.0,
    **options: Any,
) -> Outcome:
    """The same from the package."""
    hidden = inputs.hidden.detach().clone().requires_grad_()
    weight = inputs.weight.detach().clone().requires_grad_()
    options |= {"token_weights": inputs.token_weights, "reduction": reduction, "return_metrics": True}
    if path == "logits":
        loss, metrics = shaped_cross_entropy(hidden @ weight.T, inputs.targets, objective, **options)
    else:
        loss, metrics = linear_shaped_cross_entropy(
            hidden, weight, inputs.targets, objective, implementation=path, **options
        )
    (loss * upstream).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Outcome(loss.detach(), hidden.grad, weight.grad, metrics)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Largest error relative to the largest expected entry, so that zeros are compared at the scale of the rest."""
    scale = float(expected.abs().max()) or 1.0
    error = float((actual.double() - expected.double()).abs().max()) / scale
    assert error <= tolerance, (
        f"{what}: largest error {error:.2e} of the largest entry, allowed {tolerance:.2e}"
    )


def assert_outcomes_agree(actual: Outcome, expected: Outcome, tolerance: float) -> None:
    assert_close(actual.loss, expected.loss, tolerance, "loss")
    assert_close(actual.hidden_gradient, expected.hidden_gradient, tolerance, "gradient of hidden")
    assert_close(actual.weight_gradient, expected.weight_gradient, tolerance, "gradient of weight")


@dataclass(frozen=True)
class Bench:
    """What the tests of this folder share."""

    make_inputs: Callable[..., Inputs]
    oracle: Callable[..., Outcome]
    compute: Callable[..., Outcome]
    assert_agree: Callable[[Outcome, Outcome, float], None]
    assert_close: Callable[[Tensor, Tensor, float, str], None]
    uniforms: Callable[[Objective, int], list[list[float]]]
    inputs: type[Inputs]
    paths: tuple[str, ...]

    def check(
        self, path: str, objective: Objective, inputs: Inputs, tolerance: float = 1e-11, **options: Any
    ) -> None:
        """Every reduction of one path against the oracle, with upstream gradients other than 1.

        The default tolerance is for float64: sums of some hundred terms and exponents of about 30 cost
        three to four of its sixteen digits.
        """
        upstream_N = torch.linspace(-2, 3, len(inputs.targets), dtype=torch.float64)
        for reduction, upstream in (("none", upstream_N), ("sum", 1.7), ("mean", -0.3)):
            expected = self.oracle(objective, inputs, reduction, upstream, **options)
            actual = self.compute(path, objective, inputs, reduction, upstream, **options)
            self.assert_agree(actual, expected, tolerance)


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench(
        make_inputs=make_inputs,
        oracle=oracle,
        compute=compute,
        assert_agree=assert_outcomes_agree,
        assert_close=assert_close,
        uniforms=oracle_uniforms,
        inputs=Inputs,
        paths=PATHS,
    )
