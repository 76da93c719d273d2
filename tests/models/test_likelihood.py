"""Held-out likelihood against one plain forward pass a document, and the unigram floor against counting by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.small_study import Vocabulary, study_config

from rlprior.config import UsageError
from rlprior.data.packing import Corpus
from rlprior.data.prepare import prepare
from rlprior.models import likelihood
from rlprior.models.causal_lm import build_model, load_tokenizer
from rlprior.models.likelihood import (
    HeldOutDocument,
    held_out_documents,
    measure_kl,
    measure_tokens,
    unigram_cross_entropy,
)

CONFIG = study_config()
TOP_K = 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpus") / "corpus"
    prepare(CONFIG.data, directory)
    return Corpus.open(directory)


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Any:
    # a larger spread than a fresh model's, so that no two tokens are nearly as probable
    config = dataclasses.replace(CONFIG.model, initializer_range=0.2)
    return build_model(config, load_tokenizer(corpus.tokenizer_directory), max_positions=64, seed=0)


@pytest.fixture(scope="module")
def documents() -> list[HeldOutDocument]:
    """Lengths around the window of 16: shorter, one target, exactly one window, one more, several."""
    random = np.random.default_rng(0)
    return [
        HeldOutDocument(f"d/{number}", random.integers(3, 300, length).astype(np.uint16), 3 * length)
        for number, length in enumerate((9, 2, 16, 17, 18, 50, 33, 5))
    ]


def one_document(model: Any, document: HeldOutDocument, window_tokens: int) -> dict[str, float]:
    """Every token but the first, once, given what precedes it in its window; float64 from the model's logits."""
    sums = Counter[str]()
    ids = torch.from_numpy(document.token_ids.astype(np.int64))
    for start in range(0, len(ids) - 1, window_tokens):
        window = ids[start : start + window_tokens + 1]
        with torch.no_grad():
            logits = model(input_ids=window[None, :-1]).logits[0].double()
        log_p = logits.log_softmax(-1)
        for row, target in zip(log_p, window[1:], strict=True):
            sums["cross_entropy_nats"] -= float(row[target])
            sums["entropy_nats"] -= float((row.exp() * row).sum())
            sums["head_mass"] += float(row.exp().topk(TOP_K).values.sum())
            sums["target_rank"] += int((row > row[target]).sum()) + 1
            sums["num_tokens"] += 1
    return dict(sums)


@pytest.mark.parametrize("window_tokens", [16, 100, 1])
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_sums_equal_one_pass_a_document(
    model: Any, documents: list[HeldOutDocument], window_tokens: int, batch_tokens: int
) -> None:
    measured = measure_tokens(
        model, documents, window_tokens=window_tokens, top_k=TOP_K, batch_tokens=batch_tokens
    ).by_document()
    assert measured["document_ids"] == [document.id for document in documents]
    assert measured["num_bytes"] == [document.num_bytes for document in documents]
    for number, document in enumerate(documents):
        for name, total in one_document(model, document, window_tokens).items():
            # float32 logits near 10, summed over up to 50 tokens; ranks are whole numbers
            assert measured[name][number] == pytest.approx(total, rel=1e-5), (document.id, name)


def test_progress_counts_every_window(model: Any, documents: list[HeldOutDocument]) -> None:
    counts: list[int] = []
    measure_tokens(
        model, documents, window_tokens=16, top_k=TOP_K, batch_tokens=40, progress=counts.append
    ).by_document()
    assert sum(counts) == sum(math.ceil((len(document.token_ids) - 1) / 16) for document in documents)
    assert len(counts) > 1


def test_the_mode_of_the_model_is_put_back(model: Any, documents: list[HeldOutDocument]) -> None:
    model.train()
    measure_tokens(model, documents[:1], window_tokens=16, top_k=TOP_K).by_document()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_knows_nothing_has_the_entropy_of_the_vocabulary(model: Any, corpus: Corpus) -> None:
    uniform = build_model(CONFIG.model, load_tokenizer(corpus.tokenizer_directory), max_positions=64, seed=0)
    with torch.no_grad():
        uniform.get_output_embeddings().weight.zero_()
    documents = held_out_documents(corpus, ["sums"], 200)
    measured = measure_tokens(uniform, documents, window_tokens=16, top_k=TOP_K).by_document()
    num_tokens = sum(measured["num_tokens"])
    for name in ("cross_entropy_nats", "entropy_nats"):
        assert sum(measured[name]) / num_tokens == pytest.approx(math.log(300), rel=1e-6)
    # every logit ties with the k-th: the head is inclusive and takes all of them
    assert sum(measured["head_mass"]) / num_tokens == pytest.approx(1.0, rel=1e-5)
    assert sum(measured["target_rank"]) / num_tokens == 1.0


def test_documents_are_whole_and_a_smaller_budget_is_a_prefix(corpus: Corpus) -> None:
    large = held_out_documents(corpus, ["sums", "stories"], 600)
    small = held_out_documents(corpus, ["sums", "stories"], 200)
    assert [document.id for document in small] == [document.id for document in large][: len(small)]
    assert len(small) < len(large)
    counts = [len(document.token_ids) - 1 for document in large]
    assert sum(counts) >= 600 > sum(counts[:-1])
    tokenizer = load_tokenizer(corpus.tokenizer_directory)
    for document in large:
        assert document.token_ids[0] == tokenizer.bos_token_id
        assert document.token_ids[-1] == tokenizer.eos_token_id
    assert {document.id.split("/")[0] for document in small} == {"sums", "stories"}


def test_no_held_out_text_is_an_error(tmp_path: Path) -> None:
    source = dataclasses.replace(CONFIG.data.sources[0], held_out="none")
    prepare(dataclasses.replace(CONFIG.data, sources=(source,)), tmp_path / "corpus")
    with pytest.raises(UsageError, match=r"held_out_sources: no held-out text in sums"):
        held_out_documents(Corpus.open(tmp_path / "corpus"), ["sums"], 100)


def test_unigram_floor_by_hand(corpus: Corpus) -> None:
    """Frequencies of the tokens that are ever predicted, with one count added to every token of the vocabulary."""
    documents = held_out_documents(corpus, ["stories"], 300)
    train = corpus.sources["stories"].train
    counts = Counter[int]()
    for number in range(len(train)):
        counts.update(train.document(number)[1:].tolist())
    total = sum(counts.values()) + corpus.vocab_size
    expected = [
        -sum(math.log((counts[token] + 1) / total) for token in document.token_ids[1:].tolist())
        for document in documents
    ]
    # float64 sums in another order
    assert unigram_cross_entropy(corpus, ["stories"], documents) == pytest.approx(expected, rel=1e-12)


def test_unigram_floor_of_a_source_that_is_only_held_out_comes_from_the_rest_of_the_corpus(
    tmp_path: Path, corpus: Corpus
) -> None:
    """A uniform distribution would be no floor at all."""
    stories = dataclasses.replace(CONFIG.data.sources[1], held_out="all")
    prepare(dataclasses.replace(CONFIG.data, sources=(CONFIG.data.sources[0], stories)), tmp_path / "corpus")
    only_held_out = Corpus.open(tmp_path / "corpus")
    documents = held_out_documents(only_held_out, ["stories"], 300)
    floor = unigram_cross_entropy(only_held_out, ["stories"], documents)
    assert floor == unigram_cross_entropy(only_held_out, ["sums"], documents)
    assert floor == unigram_cross_entropy(only_held_out, ["sums", "stories"], documents)


def one_token(logits: torch.Tensor, target: int) -> dict[str, float]:
    """Measurements of one prediction by their definitions, in float64."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    return {
        "cross_entropy_nats": -float(log_p[target]),
        "entropy_nats": -float((p * log_p).sum()),
        "head_mass": float(p.topk(TOP_K).values.sum()),
        "target_rank": int((log_p > log_p[target]).sum()) + 1,
        "top_prob": float(p.max()),
    }


@pytest.mark.parametrize("num_given", [1, 5, 16, 17, 30])
@pytest.mark.parametrize("window_tokens", [16, 100])
def test_only_what_is_not_given_is_predicted(model: Any, num_given: int, window_tokens: int) -> None:
    """Given tokens end before, at and after the border of a window, and beyond the shorter document."""
    random = np.random.default_rng(1)
    documents = [
        HeldOutDocument(f"d/{n}", random.integers(3, 300, length).astype(np.uint16), 10, num_given)
        for n, length in enumerate((40, 18, 33))
    ]
    measured = measure_tokens(model, documents, window_tokens=window_tokens, top_k=TOP_K, batch_tokens=50)
    expected: list[dict[str, float]] = []
    for document in documents:
        ids = torch.from_numpy(document.token_ids.astype(np.int64))
        for place in range(num_given, len(ids)):
            start = (place - 1) // window_tokens * window_tokens
            with torch.no_grad():
                logits = model(input_ids=ids[None, start:place]).logits[0, -1]
            expected.append(one_token(logits, int(ids[place])))
    assert measured.num_tokens.tolist() == [max(0, len(d.token_ids) - num_given) for d in documents]
    assert len(expected) == measured.num_tokens.sum()
    for name in expected[0]:
        # float32 logits near 10 from products of other shapes
        assert getattr(measured, name) == pytest.approx([one[name] for one in expected], rel=2e-5), name
    sums = measured.by_document()
    owners = np.repeat(np.arange(3), measured.num_tokens)
    assert sums["num_top1"] == [
        sum(one["target_rank"] == 1 for one, owner in zip(expected, owners, strict=True) if owner == number)
        for number in range(3)
    ]


@pytest.fixture(scope="module")
def other_model(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(0.7)
    return other


@pytest.mark.parametrize("chunk_logits", [1, 300 * 7, 1 << 24])
def test_divergence_is_exact_over_the_vocabulary(
    model: Any,
    other_model: Any,
    documents: list[HeldOutDocument],
    chunk_logits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(likelihood, "KL_CHUNK_LOGITS", chunk_logits)
    found = measure_kl(model, other_model, documents, window_tokens=16, batch_tokens=40)
    expected: list[float] = []
    for document in documents:
        ids = torch.from_numpy(document.token_ids.astype(np.int64))
        for start in range(0, len(ids) - 1, 16):
            window = ids[None, start : min(start + 16, len(ids) - 1)]
            with torch.no_grad():
                log_p, log_q = (
                    one(input_ids=window).logits[0].double().log_softmax(-1) for one in (model, other_model)
                )
            expected += (log_q.exp() * (log_q - log_p)).sum(-1).tolist()
    # differences of float32 log-probabilities near 10: absolute errors near 1e-6
    assert found == pytest.approx(expected, rel=1e-4, abs=3e-6)
    back = measure_kl(other_model, model, documents, window_tokens=16)
    assert found.sum() != pytest.approx(back.sum(), rel=1e-3)  # it has a direction


def test_a_model_does_not_diverge_from_itself(model: Any, documents: list[HeldOutDocument]) -> None:
    assert not measure_kl(model, model, documents, window_tokens=16).any()


def test_another_vocabulary_is_refused(model: Any, corpus: Corpus, documents: list[HeldOutDocument]) -> None:
    other = build_model(CONFIG.model, Vocabulary(310), max_positions=64, seed=0)
    with pytest.raises(UsageError, match="one vocabulary: the model has 300 tokens and the reference 310"):
        measure_kl(model, other, documents, window_tokens=16)


def test_a_head_with_a_bias_is_refused(model: Any, documents: list[HeldOutDocument]) -> None:
    """The fused pass multiplies with the head's weight alone: it would measure another model."""
    biased = copy.deepcopy(model)
    head = biased.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    for measure in (
        lambda: measure_tokens(biased, documents, window_tokens=16, top_k=TOP_K),
        lambda: measure_kl(model, biased, documents, window_tokens=16),
    ):
        with pytest.raises(UsageError, match="a bias or a factor"):
            measure()


def test_a_softcap_is_part_of_the_model(documents: list[HeldOutDocument]) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=1.5,
        initializer_range=0.4,
    )
    gemma = Gemma2ForCausalLM(config).eval()
    (document,) = documents[:1]
    measured = measure_tokens(gemma, [document], window_tokens=100, top_k=TOP_K)
    ids = torch.from_numpy(document.token_ids.astype(np.int64))
    with torch.no_grad():
        logits = gemma(input_ids=ids[None, :-1]).logits[0]
    assert logits.abs().max() > 1.2  # the cap bends them
    expected = [one_token(row, int(target)) for row, target in zip(logits, ids[1:], strict=True)]
    for name in ("cross_entropy_nats", "entropy_nats", "top_prob"):
        # tanh in float32, here and there
        assert getattr(measured, name) == pytest.approx([one[name] for one in expected], rel=1e-4), name
    assert not measure_kl(gemma, gemma, [document], window_tokens=100).any()


def test_other_families_keep_their_layers_elsewhere(documents: list[HeldOutDocument]) -> None:
    """GPT-2's decoder is called `transformer`, and its positions are learned."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3)
    gpt2 = GPT2LMHeadModel(config).eval()
    (document,) = documents[5:6]
    measured = measure_tokens(gpt2, [document], window_tokens=60, top_k=TOP_K)
    ids = torch.from_numpy(document.token_ids.astype(np.int64))
    with torch.no_grad():
        logits = gpt2(input_ids=ids[None, :-1]).logits[0]
    expected = [one_token(row, int(target)) for row, target in zip(logits, ids[1:], strict=True)]
    for name in expected[0]:
        # float32 logits near 10
        assert getattr(measured, name) == pytest.approx([one[name] for one in expected], rel=2e-5), name
