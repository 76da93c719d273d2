"""Mixtures of experts as folders, the export to Qwen3-MoE, and a training step of one layer of each of the paper's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.conftest import SMALL_MIXTURE
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from rlprior.config import UsageError
from rlprior.data.packing import attention_mask
from rlprior.models.balancing import ExpertBalancer
from rlprior.models.causal_lm import (
    build_model,
    evaluation_mode,
    head_weight,
    load_model,
    packed_hidden_states,
    save_model,
)
from rlprior.models.presets import PRESETS, ModelConfig
from rlprior.models.qwen3_moe import as_qwen3_moe
from rlprior.objectives import RewardShaping, linear_shaped_cross_entropy
from rlprior.seeding import torch_generator


def random_ids(num_rows: int, length: int) -> Tensor:
    return torch.randint(3, 250, (num_rows, length), generator=torch_generator(0, "ids"))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with evaluation_mode(model):
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def biased(tokenizer: Any) -> Any:
    """A model with selection biases that change what it says."""
    model = build_model(SMALL_MIXTURE, tokenizer, max_positions=64, seed=0)
    before = logits_of(model, random_ids(2, 12))
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.2, generator=torch_generator(0, "bias"))
    assert (logits_of(model, random_ids(2, 12)) - before).abs().max() > 0.1
    return model


# folders


def test_a_saved_mixture_loads_anywhere_and_here(
    biased: Any, tokenizer_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(biased, tmp_path, tokenizer_directory=tokenizer_directory)
    ours = load_model(tmp_path)
    assert capfd.readouterr().err == ""
    # the library builds its empty shared expert, and says so
    with pytest.warns(UserWarning, match="zero-element"):
        theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(2, 12)
    expected = logits_of(biased, ids)
    for loaded in (ours, theirs):
        assert torch.equal(logits_of(loaded, ids), expected)
        assert type(loaded).__name__ == loaded.config.architectures[0] == "Dots1ForCausalLM"


def test_a_saved_mixture_holds_its_bias_and_nothing_empty(
    biased: Any, tokenizer_directory: Path, tmp_path: Path
) -> None:
    save_model(biased, tmp_path, tokenizer_directory=tokenizer_directory)
    weights = load_file(tmp_path / "model.safetensors")
    assert not [name for name, weight in weights.items() if weight.numel() == 0 or "shared" in name]
    for number, layer in enumerate(biased.model.layers):
        name = f"model.layers.{number}.mlp.gate.e_score_correction_bias"
        assert torch.equal(weights[name], layer.mlp.gate.e_score_correction_bias)
        assert weights[name].any()


def test_a_folder_says_what_vllm_asks_of_it(biased: Any) -> None:
    """vLLM's Dots1 reads these without a default, and builds the selection bias for `noaux_tc` alone."""
    config = biased.config.to_dict()
    assert config["topk_method"] == "noaux_tc"
    assert config["scoring_func"] == "sigmoid"
    assert config["moe_layer_freq"] == 1
    assert (config["n_group"], config["topk_group"], config["first_k_dense_replace"]) == (1, 1, 0)
    assert config["norm_topk_prob"] is True
    assert config["routed_scaling_factor"] == 1


def test_in_bfloat16_the_bias_stays_float32(biased: Any, tokenizer_directory: Path, tmp_path: Path) -> None:
    save_model(biased, tmp_path, tokenizer_directory=tokenizer_directory)
    with pytest.warns(UserWarning, match="zero-element"):
        half: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, original in zip(half.model.layers, biased.model.layers, strict=True):
        assert layer.mlp.gate.weight.dtype == torch.bfloat16
        bias = layer.mlp.gate.e_score_correction_bias
        assert torch.equal(bias, original.mlp.gate.e_score_correction_bias)


def test_a_packed_row_is_its_documents_each_alone(biased: Any) -> None:
    ids = random_ids(1, 20)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    owners = torch.tensor([[0] * 7 + [1] * 13])
    with evaluation_mode(biased):
        packed = packed_hidden_states(biased, ids, positions, attention_mask(owners))
        alone = [biased.model(input_ids=part).last_hidden_state for part in (ids[:, :7], ids[:, 7:])]
    # float32 sums in another order
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


# Qwen3-MoE


def test_a_model_with_a_bias_is_not_exported_to_qwen3_moe(biased: Any) -> None:
    with pytest.raises(UsageError, match="selection bias of layer 0 is not zero and Qwen3-MoE has none"):
        as_qwen3_moe(biased)


def test_sigmoid_weights_are_not_exported_to_qwen3_moe(tokenizer: Any) -> None:
    model = build_model(SMALL_MIXTURE, tokenizer, max_positions=64, seed=0)
    with pytest.raises(UsageError, match="2 experts a token: Qwen3-MoE weighs them by the softmax"):
        as_qwen3_moe(model)


def test_another_model_is_not_exported_to_qwen3_moe(tokenizer: Any) -> None:
    dense = build_model(ModelConfig(num_layers=1), tokenizer, max_positions=64, seed=0)
    with pytest.raises(UsageError, match="qwen3: only a Dots1 model"):
        as_qwen3_moe(dense)


@pytest.mark.parametrize("tied", [True, False])
def test_one_expert_a_token_is_exported_to_qwen3_moe_with_equal_logits(tokenizer: Any, tied: bool) -> None:
    config = ModelConfig(
        **{**vars(SMALL_MIXTURE), "num_experts_per_token": 1, "tied_embeddings": tied, "rope_theta": 5e4}
    )
    model = build_model(config, tokenizer, max_positions=64, seed=0)
    before = torch.get_rng_state()
    exported = as_qwen3_moe(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(exported, Qwen3MoeForCausalLM)
    ids = random_ids(4, 20)
    torch.testing.assert_close(logits_of(exported, ids), logits_of(model, ids), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        exported.model.layers[0].mlp.gate.weight.neg_()
    # the comparison can fail: experts differ
    assert (logits_of(exported, ids) - logits_of(model, ids)).abs().max() > 0.1


# one layer of each of the paper's models


@pytest.mark.parametrize(
    # 4.7 GB; a quarter of a minute of an idle core, most of it to draw 581 million initial weights
    "preset",
    ["1b", "4b", "5b-a0.3b", pytest.param("10b-a0.5b", marks=pytest.mark.slow)],
)
def test_one_layer_of_a_paper_model_trains_a_step(tokenizer: Any, preset: str) -> None:
    model = build_model(ModelConfig(preset=preset, num_layers=1), tokenizer, max_positions=64, seed=0).train()
    assert model.model.layers[0].self_attn.q_proj.out_features == PRESETS[preset].num_heads * 128
    balancer = ExpertBalancer.attach(model, rate=1e-3)
    ids = random_ids(2, 33)

    def loss() -> Tensor:
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        return linear_shaped_cross_entropy(hidden, head_weight(model), ids[:, 1:], RewardShaping(beta=-0.25))

    before = loss()
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # without moments: memory
    metrics = balancer.update()
    with torch.no_grad():
        assert loss() < before
    if PRESETS[preset].num_experts:
        assert len(balancer.relative_load[0]) == 384
        assert 0 < metrics["max_violation_max"] < 384 / 12 - 1
        assert model.model.layers[0].mlp.gate.e_score_correction_bias.abs().max() > 0
