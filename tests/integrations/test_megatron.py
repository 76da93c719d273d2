"""The loss under Megatron's signature; any number of ranks is in the table of ways, and tested with the objectives."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from rlprior.integrations.megatron import vocab_parallel_shaped_cross_entropy
from rlprior.objectives import CrossEntropy, RewardShaping, shaped_cross_entropy


def make_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 16, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randint(11, (5, 2), generator=generator)
    target[1, 1] = -100
    return logits, target


def test_one_rank_gives_the_loss_of_each_position_without_the_padding(one_process):
    logits, target = make_logits()
    shaping = RewardShaping(beta=-0.25, tail_reward=-0.1, top_k=3)
    loss = vocab_parallel_shaped_cross_entropy(
        logits, target, shaping, one_process, vocab_size=11, z_loss=0.01
    )
    loss.sum().backward()
    assert not logits.grad[..., 11:].any()
    tokens = logits.detach()[..., :11].clone().requires_grad_()
    expected = shaped_cross_entropy(tokens, target, shaping, reduction="none", z_loss=0.01)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(logits.grad[..., :11], tokens.grad, rtol=1e-12, atol=1e-15)


def test_megatrons_own_group_is_found(one_process, monkeypatch):
    state = ModuleType("megatron.core.parallel_state")
    state.get_tensor_model_parallel_group = lambda: one_process
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    logits, target = make_logits()
    found = vocab_parallel_shaped_cross_entropy(logits, target, CrossEntropy())
    assert torch.equal(
        found, vocab_parallel_shaped_cross_entropy(logits, target, CrossEntropy(), one_process)
    )


def test_without_megatron_the_group_must_be_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ImportError, match=r"give tp_group, or install Megatron.*pip install megatron-core"):
        vocab_parallel_shaped_cross_entropy(*make_logits(), CrossEntropy())
