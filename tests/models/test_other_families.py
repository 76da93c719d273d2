"""Any Hugging Face causal model with rotary positions as a start or a reference: loaded, packed, and trained like our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rlprior.data.packing import attention_mask
from rlprior.models.balancing import ExpertBalancer
from rlprior.models.causal_lm import evaluation_mode, head_weight, load_model, packed_hidden_states
from rlprior.seeding import torch_generator

COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, **EXPERTS},
    # as dots.llm1 itself: a dense layer first, and shared experts
    "Dots1": {
        "head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        **EXPERTS,
    },
    "Llama": {},
    "Mistral": {"sliding_window": None},
    # the three that ReMiT trains: norms after the blocks, layers without positions, latent attention
    "Olmo2": {},
    "SmolLM3": {},
    "Youtu": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
    },
}


def random_ids(num_rows: int, length: int) -> Tensor:
    return torch.randint(2, 50, (num_rows, length), generator=torch_generator(0, "ids"))


@pytest.fixture(scope="module", params=FAMILIES)
def original(request: pytest.FixtureRequest) -> Any:
    """A random model of a family, as somebody else would save it."""
    config = getattr(transformers, f"{request.param}Config")(**COMMON | FAMILIES[request.param])
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    return model


@pytest.fixture(scope="module")
def loaded(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp("folder")
    original.save_pretrained(directory)
    return load_model(directory)


def test_its_logits_are_its_own(original: Any, loaded: Any) -> None:
    ids = random_ids(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, original(input_ids=ids).logits)


def test_its_packed_rows_are_its_documents_each_alone(loaded: Any) -> None:
    ids = random_ids(1, 20)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    owners = torch.tensor([[0] * 7 + [1] * 13])
    with evaluation_mode(loaded):
        packed = packed_hidden_states(loaded, ids, positions, attention_mask(owners))
        alone = [loaded(input_ids=part, use_cache=False).logits for part in (ids[:, :7], ids[:, 7:])]
        leaking = packed_hidden_states(loaded, ids, positions, attention_mask(torch.zeros_like(owners)))
        logits = packed @ head_weight(loaded).T
    # float32 sums in another order; logits here reach about 10
    torch.testing.assert_close(logits, torch.cat(alone, 1), atol=1e-4, rtol=1e-5)
    assert (leaking - packed)[:, 7:].abs().max() > 0.1


def test_its_parameters_all_get_a_gradient(loaded: Any) -> None:
    loaded.train()
    balancer = ExpertBalancer.attach(loaded, rate=0.01)
    ids = random_ids(4, 16)
    mask = attention_mask(torch.zeros_like(ids))
    hidden = packed_hidden_states(loaded, ids, torch.arange(16).expand(4, -1), mask)
    (hidden @ head_weight(loaded).T).logsumexp(-1).sum().backward()
    assert [name for name, parameter in loaded.named_parameters() if parameter.grad is None] == []
    balancer.detach()
    # of the two with experts, only one has a selection bias
    assert bool(balancer.update()) is (loaded.config.model_type == "dots1")
    loaded.zero_grad()
    loaded.eval()
