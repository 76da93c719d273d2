"""What the public functions accept, refuse and promise."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.objectives.conftest import ON_CPU
from torch import nn

import rlprior.objectives
from rlprior.objectives import (
    IMPLEMENTATIONS,
    OBJECTIVES,
    CrossEntropy,
    Focal,
    LabelSmoothing,
    RewardShaping,
    SampledReward,
    linear_shaped_cross_entropy,
    shaped_cross_entropy,
)

IN_TORCH = ("auto", *(name for name in IMPLEMENTATIONS if name != "triton"))
DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "loss.md"


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (RewardShaping, {"beta": True}, "beta must be a finite number, got True"),
        (RewardShaping, {"beta": "low"}, "beta must be a finite number"),
        (RewardShaping, {"beta": -1}, "beta must be greater than -1"),
        (RewardShaping, {"head_reward": float("nan")}, "head_reward must be a finite number"),
        (RewardShaping, {"tail_reward": float("inf")}, "tail_reward must be a finite number"),
        (RewardShaping, {"tail_reward": False}, "tail_reward must be a finite number"),
        (RewardShaping, {"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        (RewardShaping, {"top_k": 10.0}, "top_k must be an integer"),
        (RewardShaping, {"top_k": True}, "top_k must be an integer"),
        (SampledReward, {"beta": -2.0}, "beta must be greater than -1"),
        (SampledReward, {"top_k": 0}, "top_k must be an integer"),
        (SampledReward, {"num_samples": 0}, "num_samples must be an integer of at least 1"),
        (SampledReward, {"seed": -1}, "seed must be an integer of at least 0"),
        (SampledReward, {"seed": 2**63}, "seed must be below"),
        (LabelSmoothing, {"smoothing": 1.0}, "smoothing must be at least 0 and below 1"),
        (LabelSmoothing, {"smoothing": -0.1}, "smoothing must be at least 0"),
        (LabelSmoothing, {"smoothing": True}, "smoothing must be a finite number"),
        (Focal, {"gamma": -0.5}, "gamma must be at least 0"),
        (Focal, {"gamma": float("inf")}, "gamma must be a finite number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, values, message):
    with pytest.raises(ValueError, match=message):
        settings(**values)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_settings_are_named_frozen_and_keyword_only(name):
    settings = OBJECTIVES[name]
    assert settings.name == name
    default = settings()
    fields = dataclasses.fields(settings)
    assert all(field.kw_only and isinstance(field.default, int | float) for field in fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.name = "other"
    assert dataclasses.replace(default) == default


def linear(**changes):
    arguments = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "targets": torch.tensor([0, 4]),
        "shaping": CrossEntropy(),
    }
    return linear_shaped_cross_entropy(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 4)}, r"same D.*got shapes \(2, 4\) and \(5, 3\)"),
        ({"weight": torch.zeros(3)}, r"weight \[V, D\]"),
        ({"weight": torch.zeros(0, 3)}, "V of at least 1"),
        ({"hidden": torch.zeros(2, 0), "weight": torch.zeros(5, 0)}, "D and V of at least 1"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.int64)}, "must be floating point"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.bfloat16)}, "must have one dtype"),
        ({"weight": torch.zeros(5, 3, device="meta")}, "must be on one device"),
        ({"targets": torch.tensor([0, 5])}, r"targets must be in \[0, 5\) or -100 \(ignore_index\), got 5"),
        ({"targets": torch.tensor([0, -1])}, "targets must be in .* got -1"),
        ({"targets": torch.tensor([0])}, r"targets must be shaped like .* \(2,\), got \(1,\)"),
        ({"targets": torch.tensor([0.0, 1.0])}, "targets must be integers"),
        ({"targets": torch.tensor([True, False])}, "targets must be integers"),
        ({"token_weights": torch.ones(3)}, "token_weights must be shaped like targets"),
        ({"token_weights": torch.ones(2, requires_grad=True)}, r"call \.detach\(\)"),
        ({"token_weights": torch.ones(2, dtype=torch.complex64)}, "token_weights must be real"),
        ({"reduction": "average"}, "reduction must be 'mean', 'sum' or 'none', got 'average'"),
        ({"implementation": "fast"}, "implementation must be one of .*'auto'.*got 'fast'"),
        ({"chunk_rows": 0}, "chunk_rows must be None or an integer of at least 1, got 0"),
        ({"chunk_rows": 1.5}, "chunk_rows must be None or an integer of at least 1, got 1.5"),
        ({"chunk_rows": True}, "chunk_rows must be None or an integer of at least 1, got True"),
        ({"metrics_top_k": 2.5}, "metrics_top_k must be None or an integer of at least 1, got 2.5"),
        ({"metrics_top_k": 0}, "metrics_top_k must be None or an integer of at least 1, got 0"),
        ({"logit_softcap": "3"}, "logit_softcap must be None or a finite number above 0, got '3'"),
        ({"z_loss": None}, "z_loss must be a finite number of at least 0, got None"),
        ({"logit_softcap": 0.0}, "logit_softcap must be None or a finite number above 0, got 0.0"),
        ({"logit_softcap": float("inf")}, "logit_softcap must be"),
        ({"z_loss": -1e-4}, "z_loss must be a finite number of at least 0, got -0.0001"),
        ({"z_loss": float("nan")}, "z_loss must be"),
        ({"shaping": "cross_entropy"}, "shaping must be an instance of one of CrossEntropy"),
        ({"shaping": CrossEntropy}, "shaping must be an instance"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        linear(**changes)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), "logits must be floating point"),
        (torch.tensor(1.0), torch.tensor(0), "logits must be"),
        (torch.zeros(2, 0), torch.tensor([0, 1]), "V of at least 1"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"targets must be in \[0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([[0, 2]]), "targets must be shaped"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64, device="meta"), "targets must be on cpu"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        shaped_cross_entropy(logits, targets, CrossEntropy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_of_any_integer_dtype(dtype):
    assert torch.equal(linear(targets=torch.tensor([0, 4], dtype=dtype)), linear())


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_views_of_targets_and_weights_are_read_as_what_they_show(bench, implementation, reduction, layout):
    inputs = bench.make_inputs(n=6, v=17).to(torch.float32)
    wide = torch.stack(
        [inputs.targets.clamp_min(0), torch.full((6,), 10**9)], dim=1
    )  # a wrong step is out of range
    weights = torch.stack([inputs.token_weights, torch.full((6,), torch.nan)], dim=1)
    targets, token_weights = wide[:, 0], weights[:, 0]
    if layout == "expanded":
        targets, token_weights = wide[:1, 0].expand(6), weights[:1, 0].expand(6)
    assert not targets.is_contiguous()

    def gradients(targets, token_weights):
        hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
        loss = linear_shaped_cross_entropy(
            hidden,
            weight,
            targets,
            RewardShaping(beta=-0.25, tail_reward=-0.1, top_k=5),
            token_weights,
            reduction=reduction,
            implementation=implementation,
        )
        loss.sum().backward()  # whose own gradient is expanded too
        return loss.detach(), hidden.grad, weight.grad

    actual, expected = gradients(targets, token_weights), gradients(targets.clone(), token_weights.clone())
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("changed", ["targets", "token_weights", "hidden"])
@pytest.mark.parametrize("implementation", [name for name in ON_CPU if name != "reference"])
def test_what_the_backward_pass_reads_again_may_not_have_changed(bench, implementation, changed):
    inputs = bench.make_inputs(n=6, v=17).to(torch.float32)
    weights = inputs.token_weights.float()
    tensors = {"targets": inputs.targets, "token_weights": weights, "hidden": inputs.hidden}
    loss = linear_shaped_cross_entropy(
        inputs.hidden.requires_grad_(),
        inputs.weight,
        inputs.targets,
        CrossEntropy(),
        weights,
        reduction="none",
        implementation=implementation,
    )
    with torch.no_grad():
        tensors[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_token_weights_may_be_a_mask():
    hidden = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    masked = linear(hidden=hidden, token_weights=torch.tensor([True, False]), reduction="none")
    assert masked[1] == 0
    assert masked[0] == linear(hidden=hidden, reduction="none")[0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_the_size_of_a_chunk_changes_nothing_but_rounding(bench, objective, reduction, chunk_rows):
    inputs = bench.make_inputs()
    expected = bench.compute("chunked", objective, inputs, reduction)
    actual = bench.compute("chunked", objective, inputs, reduction, chunk_rows=chunk_rows)
    bench.assert_agree(actual, expected, 1e-13)


class Net(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, dtype=torch.float64)
        self.layer = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layer(self.embedding(tokens[:, :-1])))
        shaping = RewardShaping(beta=0.5, tail_reward=-0.1, top_k=3)
        return linear_shaped_cross_entropy(hidden, self.embedding.weight, tokens[:, 1:], shaping)


def test_a_compiled_model_gets_the_gradients_of_an_eager_one():
    torch.manual_seed(0)
    net, tokens = Net(), torch.randint(11, (3, 8))
    gradients = []
    for model in (net, torch.compile(net, backend="aot_eager")):
        net.zero_grad()
        model(tokens).backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("implementation", IN_TORCH)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tied_embeddings(implementation, reduction):
    """One parameter read twice receives the sum of what each use would receive alone."""
    tokens, targets = torch.tensor([[0, 3, 2]]), torch.tensor([[3, 2, 1]])
    embedding = nn.Embedding(5, 4, dtype=torch.float64)

    def loss(input_weight, output_weight):
        hidden = torch.tanh(nn.functional.embedding(tokens, input_weight))
        return linear_shaped_cross_entropy(
            hidden,
            output_weight,
            targets,
            RewardShaping(beta=-0.25),
            implementation=implementation,
            reduction=reduction,
        ).sum()

    loss(embedding.weight, embedding.weight).backward()
    separate = [embedding.weight.detach().clone().requires_grad_() for _ in range(2)]
    loss(*separate).backward()
    torch.testing.assert_close(embedding.weight.grad, separate[0].grad + separate[1].grad)


@pytest.mark.parametrize("implementation", IN_TORCH)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_computes_logits_low_and_gradients_in_full(bench, implementation, reduction):
    inputs = bench.make_inputs(n=100, v=50, d=16, scale=0.5).to(torch.float32)
    shaping = RewardShaping(beta=-0.25, tail_reward=-0.1, top_k=10)
    options = {"implementation": implementation, "reduction": reduction}
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_shaped_cross_entropy(hidden, weight, inputs.targets, shaping, **options)
        loss.sum().backward()
    low = [tensor.bfloat16() for tensor in (inputs.hidden, inputs.weight)]
    expected = linear_shaped_cross_entropy(*low, inputs.targets, shaping, **options)
    assert torch.equal(loss, expected)
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    rounded = bench.inputs(*(tensor.double() for tensor in low), inputs.targets, torch.ones(100).double())
    full = bench.compute("chunked", shaping, rounded, reduction)
    # bfloat16 logits up to about 10 are off by up to 0.02, and probabilities by as much, relative to themselves.
    bench.assert_close(weight.grad, full.weight_gradient, 0.02, "gradient of weight")
    bench.assert_close(hidden.grad, full.hidden_gradient, 0.02, "gradient of hidden")
    if implementation != "reference":
        assert not torch.equal(weight.grad, weight.grad.bfloat16().float())  # accumulated in float32


def test_autocast_does_not_touch_given_logits(bench, objective):
    inputs = bench.make_inputs()
    logits = inputs.logits.bfloat16()
    expected = shaped_cross_entropy(logits, inputs.targets, objective)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shaped_cross_entropy(logits, inputs.targets, objective), expected)


def test_autocast_leaves_float64_alone():
    hidden = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = linear(hidden=hidden, weight=weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(hidden=hidden, weight=weight), expected)


def test_no_graph_without_grad_mode():
    hidden = torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        loss, metrics = linear(hidden=hidden, return_metrics=True, reduction="sum")
    assert not loss.requires_grad
    assert not metrics.entropy.requires_grad


def test_inputs_are_left_untouched(bench, objective, path):
    inputs = bench.make_inputs()
    copies = [getattr(inputs, field.name).clone() for field in dataclasses.fields(inputs)]
    bench.compute(path, objective, inputs, "none")
    for field, copy in zip(dataclasses.fields(inputs), copies, strict=True):
        assert torch.equal(getattr(inputs, field.name), copy)


def test_the_same_call_gives_the_same_bytes(bench, objective, path):
    inputs = bench.make_inputs().to(torch.float32)
    first, second = (bench.compute(path, objective, inputs, "mean") for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.hidden_gradient, second.hidden_gradient)
    assert torch.equal(first.weight_gradient, second.weight_gradient)


def test_import_needs_torch_alone():
    """In a fresh interpreter that cannot import what the rest of the project adds."""
    program = """
import sys

BLOCKED = {"triton", "transformers", "tokenizers", "safetensors", "scipy", "matplotlib", "jinja2", "rich", "datasets", "pyarrow"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Block())
import torch
from rlprior.objectives import CrossEntropy, linear_shaped_cross_entropy
print(linear_shaped_cross_entropy(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([1]), CrossEntropy()).item())
print(sorted(name for name in sys.modules if name.startswith("rlprior") and not name.startswith("rlprior.objectives")))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["1.3862943649291992", "['rlprior']"]


def test_documentation_covers_every_objective_and_implementation():
    text = DOCUMENTATION.read_text(encoding="utf-8")
    for name, settings in OBJECTIVES.items():
        assert f"`{name}`" in text
        assert f"`{settings.__name__}`" in text
        for field in dataclasses.fields(settings):
            assert f"`{field.name}`" in text
    for implementation in IMPLEMENTATIONS:
        assert f"`{implementation}`" in text


def test_every_settings_class_is_exported():
    assert {settings.__name__ for settings in OBJECTIVES.values()} <= set(rlprior.objectives.__all__)
