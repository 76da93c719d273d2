"""oneDNN's products are the linear layers' own, at the same precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_study import Vocabulary
from torch import nn

from rlprior.models import onednn
from rlprior.models.causal_lm import build_model
from rlprior.models.onednn import (
    MIN_ROWS_WITHOUT_GRADIENT,
    is_onednn_faster,
    multiply_with_onednn,
    multiplying_with_onednn,
)
from rlprior.models.presets import ModelConfig


class Small(nn.Module):
    """Two layers and a head."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40, bias=bias)
        self.down = nn.Linear(40, 24, bias=bias)
        self.head = nn.Linear(24, 7, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(inputs))))


def gradients(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = inputs.detach().requires_grad_()
    output = model(inputs)
    (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    assert inputs.grad is not None
    found = [output.detach(), inputs.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["rows", "batches", "transposed", "one"])
def test_values_and_gradients_are_as_exact_as_pytorchs(bias: bool, layout: str) -> None:
    torch.manual_seed(0)
    model = Small(bias)
    inputs = {
        "rows": torch.randn(50, 24),
        "batches": torch.randn(3, 5, 24),
        "transposed": torch.randn(24, 50).t(),
        "one": torch.randn(24),
    }[layout]
    exact = gradients(copy.deepcopy(model).double(), inputs.double())
    own = gradients(model, inputs)
    multiply_with_onednn(model)
    found = gradients(model, inputs)
    # sums of some dozen float32 products; another library adds them in another order
    assert error(found, exact) < 2 * error(own, exact) + 1e-7
    assert error(found, exact) < 1e-6


def test_other_dtypes_autocast_and_no_rows_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small(bias=True)
    multiply_with_onednn(model)
    monkeypatch.delattr(onednn, "_multiply")
    assert copy.deepcopy(model).double()(torch.ones(2, 24).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(2, 24)).dtype == torch.bfloat16
    assert model(torch.ones(0, 24)).shape == (0, 7)
    with torch.no_grad():
        model(torch.ones(MIN_ROWS_WITHOUT_GRADIENT - 1, 24))
    with pytest.raises(NameError):
        model(torch.ones(2, 24))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(50, 24), (40, 1, 24), (2, 20, 24)])
def test_many_rows_without_gradients_are_multiplied_within_the_context(
    bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "is_onednn_faster", lambda: True)
    model, inputs = Small(bias), torch.randn(shape)
    exact = copy.deepcopy(model).double()(inputs.double()).detach()
    names = list(model.state_dict())
    with torch.inference_mode(), torch.profiler.profile() as profile, multiplying_with_onednn(model):
        found = model(inputs)
        assert list(model.state_dict()) == names
    calls = sum(one.count for one in profile.key_averages() if one.key == "mkldnn::_linear_pointwise")
    assert calls == 3  # the head too
    assert found.shape == exact.shape
    # sums of some dozen float32 products
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_context_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small(bias=True)
    multiply_with_onednn(model)
    patched = model.up.forward
    monkeypatch.setattr(onednn, "is_onednn_faster", lambda: True)
    with multiplying_with_onednn(model):
        assert "forward" in vars(model.head)
    assert model.up.forward is patched
    assert "forward" not in vars(model.head)
    monkeypatch.setattr(onednn, "is_onednn_faster", lambda: False)
    with multiplying_with_onednn(model):
        assert "forward" not in vars(model.head)


def test_a_second_derivative_is_refused() -> None:
    model = Small(bias=False)
    multiply_with_onednn(model)
    inputs = torch.ones(4, 24, requires_grad=True)
    (first,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_frozen_layer_gets_no_gradient_and_passes_it_on() -> None:
    model = Small(bias=True)
    expected = gradients(model, torch.ones(4, 24))
    model.up.requires_grad_(False)
    multiply_with_onednn(model)
    found = gradients(model, torch.ones(4, 24))
    assert model.up.weight.grad is None
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_the_head_is_left_alone_and_a_copy_has_weights_of_its_own() -> None:
    model = Small(bias=False)
    names = list(model.state_dict())
    multiply_with_onednn(model)
    assert list(model.state_dict()) == names
    assert "forward" not in vars(model.head)
    assert "forward" in vars(model.up)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.up.weight.zero_()
    inputs = torch.randn(3, 24).requires_grad_()
    assert not torch.equal(other(inputs), model(inputs))


def test_a_model_trains_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear layer of a decoder but the head, and no gradient is lost."""

    calls: list[tuple[int, ...]] = []
    original = onednn._multiply

    def count(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(right.shape))
        return original(left, right)

    monkeypatch.setattr(onednn, "_multiply", count)
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    config = ModelConfig(**shape, num_heads=2, num_key_value_heads=1, head_dim=16)
    model = build_model(config, Vocabulary(24), max_positions=16, seed=0).train()
    multiply_with_onednn(model)
    ids = torch.arange(10)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 2 * 7 * 3
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_only_processors_that_gain_are_chosen(
    vendor: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id : {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    is_onednn_faster.cache_clear()
    assert is_onednn_faster() is expected
    is_onednn_faster.cache_clear()
