"""Rollout engines: one contract for the built-in sampler, its copy of a sharded policy, and vLLM's interface (a stand-in, not vLLM)."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.conftest import SMALL_MIXTURE
from tests.rl import vllm_double
from tests.small_study import study_config

from rlprior.config import UsageError
from rlprior.data.packing import Corpus
from rlprior.data.prepare import prepare
from rlprior.models.causal_lm import build_model, load_model, load_tokenizer, save_model
from rlprior.rl.config import RolloutConfig
from rlprior.sampling.engines import BuiltinEngine, RolloutEngine, VllmEngine, check_engine, open_engine
from rlprior.sampling.sampler import Decoding
from rlprior.seeding import torch_generator
from rlprior.world import ALONE, World

CONFIG = study_config()
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
DECODING = Decoding(temperature=0.8, top_p=0.95, max_new_tokens=12)
EOS = 40


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with uneven probabilities as a Hugging Face folder."""
    root = tmp_path_factory.mktemp("policy")
    prepare(CONFIG.data, root / "corpus")
    tokenizer_directory = Corpus.open(root / "corpus").tokenizer_directory
    shape = dataclasses.replace(CONFIG.model, initializer_range=0.2)
    model = build_model(shape, load_tokenizer(tokenizer_directory), max_positions=64, seed=0)
    save_model(model, root / "policy", tokenizer_directory=tokenizer_directory)
    return root / "policy"


@pytest.fixture(params=["the policy itself", "a copy for a sharded policy", "vllm"])
def engine(
    request: pytest.FixtureRequest, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RolloutEngine, Any]:
    model = load_model(policy).train()
    if request.param == "the policy itself":
        return open_engine(
            RolloutConfig(), model, policy, max_length=64, precision="float32", world=ALONE
        ), model
    if request.param == "vllm":
        monkeypatch.setitem(sys.modules, "vllm", vllm_double)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
        config = RolloutConfig(engine="vllm")
        return open_engine(config, model, policy, max_length=64, precision="float32", world=ALONE), model
    return BuiltinEngine(model, None, World(0, 2), max_rows=10), model


def draw(engine: RolloutEngine, seed: int = 0) -> Any:
    generators = [
        [torch_generator(seed, number, index) for index in range(5)] for number in range(len(PROMPTS))
    ]
    return engine.sample(PROMPTS, decoding=DECODING, eos_token_id=EOS, generators=generators)


def test_log_probabilities_are_the_policys(engine: tuple[RolloutEngine, Any]) -> None:
    sampler, model = engine
    for prompt, responses in zip(PROMPTS, draw(sampler), strict=True):
        assert len(responses) == 5
        for response in responses:
            ids = torch.tensor([[*prompt, *response.token_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].detach()
            log_probs = (logits / DECODING.temperature).log_softmax(-1)
            own = log_probs.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            nucleus = torch.tensor(response.log_probs) - own
            # the nucleus makes every token that is left likelier, by at most its mass
            assert (nucleus > -1e-5).all()
            assert (nucleus < -torch.tensor(DECODING.top_p).log() + 1e-5).all()


def test_responses_end_as_they_say(engine: tuple[RolloutEngine, Any]) -> None:
    sampler, _ = engine
    responses = [one for group in draw(sampler) for one in group]
    for response in responses:
        assert len(response.token_ids) == len(response.log_probs) <= DECODING.max_new_tokens
        assert (response.finish_reason == "stop") == (response.token_ids[-1] == EOS)
        assert EOS not in response.token_ids[:-1]


def test_the_seed_decides(engine: tuple[RolloutEngine, Any]) -> None:
    sampler, _ = engine
    assert draw(sampler, 0) == draw(sampler, 0)
    assert draw(sampler, 0) != draw(sampler, 1)


def test_it_draws_from_the_weights_that_were_loaded_last(engine: tuple[RolloutEngine, Any]) -> None:
    sampler, model = engine
    with torch.no_grad():
        model.get_output_embeddings().weight[7] += 3.0
    sampler.load(model)
    test_log_probabilities_are_the_policys(engine)


def test_without_vllm_one_line_says_what_to_install(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"needs vLLM; pip install 'rlprior\[vllm\]', or write 'builtin'"):
        VllmEngine(load_model(policy), policy, RolloutConfig(engine="vllm"), max_length=64, dtype="float32")
    check_engine(RolloutConfig())


def test_vllm_takes_no_mixtures_of_experts(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts are named one by one, those of training are one tensor: handing them over would fail after the first update."""
    monkeypatch.setitem(sys.modules, "vllm", vllm_double)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    mixture = build_model(SMALL_MIXTURE, load_tokenizer(policy), max_positions=64, seed=0)
    with pytest.raises(UsageError, match=r"experts have other names .* write rl.rollout.engine = 'builtin'"):
        VllmEngine(mixture, policy, RolloutConfig(engine="vllm"), max_length=64, dtype="float32")


def test_vllm_is_told_of_positions_that_the_folder_does_not_have(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", vllm_double)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    model = load_model(policy, max_positions=500)
    VllmEngine(model, policy, RolloutConfig(engine="vllm"), max_length=500, dtype="float32")


def test_a_copy_in_bfloat16_keeps_its_buffers(policy: Path) -> None:
    """Rotary frequencies of 8 bits would put later tokens elsewhere than the trainer does, which keeps them in float32."""
    model = build_model(SMALL_MIXTURE, load_tokenizer(policy), max_positions=64, seed=0)
    copied = BuiltinEngine(model, torch.bfloat16, World(0, 2), max_rows=10).model
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    buffers = dict(model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in copied.named_buffers():
        assert torch.equal(buffer, buffers[name])
        assert buffer.dtype == buffers[name].dtype
    head, embedding = copied.get_output_embeddings().weight, copied.get_input_embeddings().weight
    assert (head is embedding) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


def test_bfloat16_is_sampled_in_the_trainers_arithmetic(policy: Path) -> None:
    model = load_model(policy).train()
    sampler = open_engine(RolloutConfig(), model, policy, max_length=64, precision="bfloat16", world=ALONE)
    model.eval()
    for prompt, responses in zip(PROMPTS, draw(sampler), strict=True):
        for response in responses:
            ids = torch.tensor([[*prompt, *response.token_ids]])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            log_probs = (logits / DECODING.temperature).log_softmax(-1)
            own = log_probs.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            # bfloat16 has 8 bits: logits near 4 are good to 0.02, and products of other shapes round otherwise
            assert (torch.tensor(response.log_probs) - own).abs().max() < 0.2
