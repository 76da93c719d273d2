"""Numbers of single tokens against a plain forward pass; pieces of text against decoding at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluation.sampled_run import SHAPE, plain_scores
from transformers import Gemma2Config, GPT2Config, GraniteConfig

from rlprior.config import RunError, UsageError
from rlprior.data.tokenizer import train_tokenizer
from rlprior.models import token_scores as token_scores_module
from rlprior.models.causal_lm import build_model, new_model
from rlprior.models.token_scores import Continuation, score_tokens, token_pieces

TOKENIZER = train_tokenizer(["Q: 2+2\nA: 4", "naïve café"], 280)
SMALL = {
    "vocab_size": 280,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def continuations(lengths: list[tuple[int, int]]) -> list[Continuation]:
    random = np.random.default_rng(0)
    return [
        Continuation(random.integers(3, 260, p).tolist(), random.integers(3, 260, r).tolist())
        for p, r in lengths
    ]


def check(model: Any, asked: list[Continuation]) -> None:
    model.eval()
    for one, scores in zip(asked, score_tokens(model, asked, name="model"), strict=True):
        log_probs, entropies = (
            plain_scores(model, one.prompt_ids, one.response_ids) if one.response_ids else ([], [])
        )
        # float32 logits of a few units: rounding of 1e-6 of them, summed over 280 terms
        assert scores.log_prob_nats == pytest.approx(log_probs, rel=1e-4, abs=1e-4)
        assert scores.entropy_nats == pytest.approx(entropies, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_numbers_equal_one_plain_pass_a_response(monkeypatch: pytest.MonkeyPatch, batch_tokens: int) -> None:
    monkeypatch.setattr(token_scores_module, "BATCH_TOKENS", batch_tokens)
    asked = continuations([(3, 7), (1, 1), (20, 2), (2, 0), (5, 30), (3, 7)])
    check(build_model(SHAPE, TOKENIZER, max_positions=64, seed=0), asked)


def small_models() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "learned positions": new_model(
                GPT2Config(
                    vocab_size=280, n_embd=16, n_layer=1, n_head=2, n_positions=40, initializer_range=0.3
                )
            ),
            "softcap": new_model(Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
            "scaled logits": new_model(
                GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=3.0)
            ),
        }


@pytest.mark.parametrize("name", ["learned positions", "softcap"])
def test_other_families(name: str) -> None:
    check(small_models()[name], continuations([(3, 7), (5, 20)]))


def test_a_head_that_does_more_is_refused() -> None:
    with pytest.raises(UsageError, match="m: its logits are more than its hidden states times its output"):
        score_tokens(small_models()["scaled logits"].eval(), continuations([(3, 7)]), name="m")


def test_progress_counts_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores_module, "BATCH_TOKENS", 20)
    model, counts = build_model(SHAPE, TOKENIZER, max_positions=64, seed=0), []
    score_tokens(model, continuations([(3, 7), (2, 0), (1, 4), (9, 9)]), name="m", progress=counts.append)
    assert sum(counts) == 3
    assert len(counts) > 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Continuation([3], [4, 280]), "m: has no token 280"),
        (
            Continuation([3] * 30, [4] * 12),
            "m: has 40 learned positions, and a prompt with its response takes 41",
        ),
    ],
)
def test_what_a_model_does_not_have_is_refused(asked: Continuation, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        score_tokens(small_models()["learned positions"], [asked], name="m")


def test_rotary_positions_may_go_on() -> None:
    check(build_model(SHAPE, TOKENIZER, max_positions=16, seed=0), continuations([(20, 10)]))


def test_a_response_may_fill_all_positions() -> None:
    """The last token is predicted, never read."""
    check(small_models()["learned positions"], continuations([(30, 11)]))


def test_logits_that_are_not_numbers_are_told() -> None:
    model = build_model(SHAPE, TOKENIZER, max_positions=64, seed=0)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(RunError, match="m: its logits are not numbers"):
        score_tokens(model, continuations([(3, 7)]), name="m")


# Pieces


def test_pieces_by_hand() -> None:
    ids = TOKENIZER("é 2", add_special_tokens=False)["input_ids"]
    assert token_pieces(TOKENIZER, ids) == ["é", " ", "2"]
    face = TOKENIZER("a\U0001f600!", add_special_tokens=False)["input_ids"]
    assert token_pieces(TOKENIZER, face) == ["a", "", "", "", "\U0001f600", "!"]
    assert token_pieces(TOKENIZER, face[:3]) == ["a", "", "\ufffd"]
    assert token_pieces(TOKENIZER, [*ids, TOKENIZER.eos_token_id]) == ["é", " ", "2", "<|eos|>"]
    assert token_pieces(TOKENIZER, []) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30))
def test_pieces_are_the_text(ids: list[int]) -> None:
    pieces = token_pieces(TOKENIZER, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=False)


def test_pieces_where_a_first_space_is_dropped(tmp_path: Path) -> None:
    """SentencePiece-like tokenizers decode a word by itself without the space before it, and unfinished bytes one by one."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"▁two": 0, "▁words": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    assert token_pieces(tokenizer, [0, 1, 2, 3, 4, 1]) == ["two", " words", "", "", "€", " words"]
