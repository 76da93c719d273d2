"""The loss for torchtitan: its contract, alone and inside the chunked wrapper, on a double of torchtitan's loss module."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations import titan_double
from torch import Tensor, distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from rlprior.integrations import torchtitan
from rlprior.objectives import Objective, RewardShaping, SampledReward, shaped_cross_entropy

SHAPING = RewardShaping(beta=-0.25, head_reward=0.1, tail_reward=-0.1, top_k=5)


@pytest.fixture(params=["double", "torchtitan"])
def loss_module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torchtitan's loss module, or the double of it."""
    if request.param == "double":
        titan_double.install(monkeypatch)
    elif importlib.util.find_spec("torchtitan") is None:
        pytest.skip("torchtitan is not installed; its double stands in")
    torchtitan._loss_class.cache_clear()
    yield importlib.import_module("torchtitan.components.loss")
    torchtitan._loss_class.cache_clear()


def model() -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
    """Decoder, head, inputs [B, T, D] and labels [B, T]."""
    generator = torch.Generator().manual_seed(0)
    decoder, head = nn.Linear(6, 6).double(), nn.Linear(6, 17, bias=False).double()
    with torch.no_grad():
        for parameter in (*decoder.parameters(), *head.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    inputs = torch.randn(3, 8, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(17, (3, 8), generator=generator)
    labels[:, ::5] = -100
    return decoder, head, inputs, labels


def step(loss_fn: Any, *, skips_head: bool, parts: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one step as torchtitan's trainer takes it, in `parts` micro-batches."""
    decoder, head, inputs, labels = model()
    if skips_head:
        loss_fn.set_lm_head(head)
    count = (labels != -100).sum()
    total = torch.zeros((), dtype=torch.float64)
    for part_inputs, part_labels in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
        hidden = decoder(part_inputs)
        loss, metrics = loss_fn(hidden if skips_head else head(hidden), part_labels, count, positions=None)
        assert metrics == {}
        loss.backward()
        total += loss.detach()
    return total, [parameter.grad for parameter in (*decoder.parameters(), *head.parameters())]  # type: ignore[misc]


def expected_step(shaping: Objective) -> tuple[Tensor, list[Tensor]]:
    decoder, head, inputs, labels = model()
    loss = shaped_cross_entropy(head(decoder(inputs)), labels, shaping)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in (*decoder.parameters(), *head.parameters())]  # type: ignore[misc]


@pytest.mark.parametrize("num_chunks", [None, 1, 4])
@pytest.mark.parametrize("parts", [1, 3])
def test_any_split_has_the_same_gradient(loss_module: Any, num_chunks: int | None, parts: int):
    config = torchtitan.shaped_loss_config(SHAPING)
    assert isinstance(config, loss_module.BaseLoss.Config)
    if num_chunks is not None:
        config = loss_module.ChunkedLossWrapper.Config(num_chunks=num_chunks, loss_fn=config)
    found = step(config.build(), skips_head=num_chunks is not None, parts=parts)
    # the wrapper of torchtitan puts gradients together in float32
    torch.testing.assert_close(found, expected_step(SHAPING), rtol=1e-5, atol=1e-6)


def test_zero_shaping_is_cross_entropy(loss_module: Any):
    own = step(loss_module.CrossEntropyLoss.Config().build(), skips_head=False)
    found = step(torchtitan.shaped_loss_config(RewardShaping()).build(compile_config=None), skips_head=False)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)  # its own is computed in float32


def test_validation_sums(loss_module: Any):
    """The validator gives no count, needs no gradient, and divides the sum itself."""
    decoder, head, inputs, labels = model()
    wrapper = loss_module.ChunkedLossWrapper.Config(
        num_chunks=4, loss_fn=torchtitan.shaped_loss_config(SHAPING)
    ).build()
    wrapper.set_lm_head(head)
    with torch.no_grad():
        loss, _ = wrapper(decoder(inputs), labels)
    expected, _ = expected_step(SHAPING)
    torch.testing.assert_close(
        loss.double() / (labels != -100).sum(), expected, rtol=1e-6, atol=0
    )  # a float32 sum


def test_draws_go_on_from_call_to_call(loss_module: Any):
    logits, labels = torch.linspace(0, 1, 51).reshape(3, 17), torch.tensor([1, 2, 3])
    config = torchtitan.shaped_loss_config(SampledReward(beta=-0.25, head_reward=0.5, tail_reward=-0.5))
    first, second = config.build(), config.build()
    losses = [float(first(logits, labels)[0]) for _ in range(2)]
    assert losses == [float(second(logits, labels)[0]) for _ in range(2)]
    assert losses[0] != losses[1]


def test_what_it_does_not_support_is_refused(loss_module: Any):
    with pytest.raises(ValueError, match="shaping must be an instance"):
        torchtitan.shaped_loss_config("cross_entropy")  # pyright: ignore[reportArgumentType]


def test_logits_split_over_ranks_are_refused(loss_module: Any, tmp_path: Path):
    loss_fn = torchtitan.shaped_loss_config(SHAPING).build()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        logits = distribute_tensor(torch.zeros(3, 17), init_device_mesh("cpu", (1,)), [Shard(1)])
        with pytest.raises(ValueError, match="the logits are split over ranks"):
            loss_fn(logits, torch.tensor([1, 2, 3]))
    finally:
        distributed.destroy_process_group()


def test_absence_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch):
    if importlib.util.find_spec("torchtitan") is not None:
        pytest.skip("torchtitan is installed")
    torchtitan._loss_class.cache_clear()
    with pytest.raises(ImportError, match="pip install torchtitan"):
        torchtitan.shaped_loss_config(SHAPING)
