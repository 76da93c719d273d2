"""The sampler's cache: what it returns is what the library's own cache returns, whichever rows end and however long it grows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.conftest import SMALL_MIXTURE
from tests.sampling.test_sampler import PROMPTS, draw_samples, flat, forward_log_probs
from torch import Tensor
from transformers.cache_utils import DynamicCache

from rlprior.models.causal_lm import build_model, new_model
from rlprior.sampling.cache import ROOM_TOKENS, RoomyLayer, repeat_rows
from rlprior.sampling.sampler import Decoding, _fill_gaps

# R rows, H heads, T positions, D head dimension


def new_states(num_rows: int, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_rows, 2, num_tokens, 4, generator=generator)
    values = torch.randn(num_rows, 2, num_tokens, 3, generator=generator)
    return keys, values


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_it_holds_what_the_librarys_cache_holds(data: st.DataObject) -> None:
    cache = DynamicCache()
    cache.update(*new_states(3, 5, seed=0), 0)
    repeats = data.draw(st.integers(1, 4))
    own = repeat_rows(copy.deepcopy(cache), repeats)
    assert type(own.layers[0]) is RoomyLayer
    cache.batch_repeat_interleave(repeats)
    num_rows = 3 * repeats
    for step in range(data.draw(st.integers(1, 6))):
        num_tokens = data.draw(st.sampled_from([1, 1, 2, ROOM_TOKENS]))
        states = new_states(num_rows, num_tokens, seed=step + 1)
        for found, expected in zip(own.update(*states, 0), cache.update(*states, 0), strict=True):
            assert torch.equal(found, expected)
        assert own.get_seq_length() == cache.get_seq_length()
        alive = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)))
        if alive.any():
            kept = _fill_gaps(alive)
            own.batch_select_indices(kept)
            cache.batch_select_indices(kept)
            num_rows = len(kept)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_gaps_are_filled_from_behind(alive: list[bool]) -> None:
    kept = _fill_gaps(torch.tensor(alive)).tolist()
    assert sorted(kept) == [i for i, lives in enumerate(alive) if lives]
    assert all(i == place for place, i in enumerate(kept) if alive[place])


def test_tokens_of_the_prompts_are_not_copied_at_each_step() -> None:
    cache = DynamicCache()
    cache.update(*new_states(3, 5, seed=0), 0)
    own = repeat_rows(cache, 2)
    first = own.update(*new_states(6, 1, seed=1), 0)[0].data_ptr()
    for seed in range(ROOM_TOKENS - 1):
        keys, _ = own.update(*new_states(6, 1, seed), 0)
        assert keys.data_ptr() == first


# whole responses, longer than the first buffers, against the forward pass


def mixture(tokenizer: Any) -> Any:
    return build_model(SMALL_MIXTURE, tokenizer, max_positions=128, seed=0)


def of_config(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_model(config)


SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

MODELS = {
    "mixture": mixture,
    "untied": lambda _: of_config(transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False)),
    "scaled-positions": lambda _: of_config(
        transformers.Qwen3Config(**SIZES, head_dim=8, rope_parameters=YARN)
    ),
    "some-windows": lambda _: of_config(
        transformers.Qwen3Config(
            **SIZES, head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=1
        )
    ),
    "llama": lambda _: of_config(transformers.LlamaConfig(**SIZES)),
    "all-windows": lambda _: of_config(transformers.MistralConfig(**SIZES, sliding_window=6)),
}


@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[0], PROMPTS[3]]], ids=["padded", "equal"])
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_full_forward_pass(
    name: str, prompts: list[list[int]], tokenizer: Any
) -> None:
    model = MODELS[name](tokenizer).eval()
    length = ROOM_TOKENS + 6
    whole = flat(draw_samples(model, prompts, max_new_tokens=length))
    tokens = [token for response in whole for token in response.token_ids]
    # one that ends some rows early, not all
    eos = min(set(tokens), key=lambda token: (abs(tokens.count(token) - 2 * len(whole) // 3), token))
    groups = draw_samples(model, prompts, max_new_tokens=length, eos_token_id=eos)
    for prompt, group in zip(prompts, groups, strict=True):
        for response in group:
            exact = forward_log_probs(model, prompt, response, Decoding())
            # float32 logits near 10, which the cached pass sums in another order
            torch.testing.assert_close(torch.tensor(response.log_probs).double(), exact, atol=1e-5, rtol=1e-5)
    lengths = {len(response.token_ids) for response in flat(groups)}
    assert len(lengths) > 2
    assert max(lengths) == length


@pytest.mark.parametrize("name", ["untied", "mixture"])
def test_two_runs_give_the_same_bytes(name: str, tokenizer: Any) -> None:
    model = MODELS[name](tokenizer).eval()
    settings: dict[str, Any] = {"samples_per_prompt": 16, "max_new_tokens": 12, "eos_token_id": 7}
    assert draw_samples(model, **settings) == draw_samples(model, **settings)


def test_one_row_and_rows_that_end_together(model: Any) -> None:
    (alone,) = flat(draw_samples(model, [PROMPTS[2]], samples_per_prompt=1, max_new_tokens=80))
    assert len(alone.token_ids) == 80
    exact = forward_log_probs(model, PROMPTS[2], alone, Decoding())
    torch.testing.assert_close(torch.tensor(alone.log_probs).double(), exact, atol=1e-5, rtol=1e-5)
    # so cold that all rows of a prompt are one and the same
    settings: dict[str, Any] = {"temperature": 1e-3, "max_new_tokens": 8}
    (sure, *_) = flat(draw_samples(model, [PROMPTS[1]], **settings))
    eos = sure.token_ids[2]
    stop = sure.token_ids.index(eos) + 1
    for response in flat(draw_samples(model, [PROMPTS[1]], eos_token_id=eos, **settings)):
        assert (response.token_ids, response.finish_reason) == (sure.token_ids[:stop], "stop")
