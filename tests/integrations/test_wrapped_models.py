"""Patched models under FSDP2, tensor parallelism and PEFT: what works, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.small_models import (
    SHAPING,
    assert_same_gradients,
    examples,
    expected_gradients,
    gradients,
    num_targets,
    pad,
    small_model,
)
from tests.integrations.trainers import run_trainer, sft_trainer
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from rlprior.integrations.huggingface import patch_model, shaped_loss
from rlprior.integrations.trl import patch_trainer
from rlprior.objectives import CrossEntropy

# trl and peft ask for gradient checkpointing under the name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize("keeps_weight", [False, True])
def test_an_fsdp_unit_of_the_head_alone(one_process: distributed.ProcessGroup, keeps_weight: bool):
    """The weight is there while the unit's forward pass runs; the loss comes after it."""
    model = small_model("llama")
    patch_model(model, SHAPING)
    fully_shard(model.lm_head, reshard_after_forward=not keeps_weight)
    fully_shard(model)
    if keeps_weight:
        model(**pad(examples())).loss.backward()
        assert_same_gradients(gradients(model), expected_gradients(family="llama"))
    else:
        with pytest.raises(RuntimeError, match="frees its weight before the loss is computed"):
            model(**pad(examples()))


def test_a_model_patched_after_it_was_sharded(one_process: distributed.ProcessGroup):
    model = small_model()
    fully_shard(model)
    patch_model(model, SHAPING)
    model(**pad(examples())).loss.backward()
    assert_same_gradients(gradients(model), expected_gradients())


def test_a_head_over_tensor_parallel_ranks_is_refused(one_process: distributed.ProcessGroup):
    model = small_model("llama")
    mesh = init_device_mesh("cpu", (1,))
    parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
    patch_model(model, SHAPING)
    with pytest.raises(ValueError, match="head is split over ranks"):
        model(**pad(examples()))


def with_adapters(**settings: Any) -> Any:
    """A PEFT model; adapters start away from zero, so that all of them have a gradient."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model = small_model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **settings))


ADAPTERS = [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["embed_tokens", "down_proj"]}]


def own_gradients(**settings: Any) -> dict[str, Tensor]:
    model = with_adapters(**settings)
    model(**pad(examples()), num_items_in_batch=num_targets(examples())).loss.backward()
    found = gradients(model)
    assert found
    assert all("lora" in name or "lm_head" in name for name in found)
    return found


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_adapters_have_the_gradient_of_the_models_own_loss(adapters: dict[str, Any], tmp_path: Path):
    expected = own_gradients(**adapters)
    model = with_adapters(**adapters)
    patch_model(model.get_base_model(), CrossEntropy())
    outputs = model(**pad(examples()), num_items_in_batch=num_targets(examples()))
    outputs.loss.backward()
    assert outputs.logits is None
    assert_same_gradients(gradients(model), expected)
    assert_same_gradients(run_trainer(model, tmp_path, batch_size=5, accumulation=3), expected)


def test_adapters_under_trl(tmp_path: Path):
    expected = own_gradients(**ADAPTERS[0])
    trainer, catcher = sft_trainer(with_adapters(**ADAPTERS[0]), tmp_path, batch_size=5, accumulation=3)
    patch_trainer(trainer, CrossEntropy())
    trainer.train()
    assert_same_gradients(catcher.gradients, expected)


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_is_refused_and_has_another_way(settings: dict[str, Any], tmp_path: Path):
    settings = {"target_modules": ["q_proj"], **settings}
    model = with_adapters(**settings)
    with pytest.raises(ValueError, match=r"has a peft\..* as its head; use compute_loss_func"):
        patch_model(model.get_base_model(), SHAPING)
    compute_loss = shaped_loss(CrossEntropy())
    found = run_trainer(model, tmp_path, batch_size=5, accumulation=3, compute_loss_func=compute_loss)
    assert_same_gradients(found, own_gradients(**settings))


def test_an_adapter_that_comes_to_the_head_later_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model = small_model("llama")
    patch_model(model, SHAPING)
    assert model(**pad(examples())).loss.isfinite()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="changes its logits in a way"):
        wrapped(**pad(examples()))


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match="pass the model inside"):
        patch_model(with_adapters(**ADAPTERS[0]), SHAPING)
