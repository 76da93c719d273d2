"""Held-out likelihood against one plain forward pass a document, and the unigram floor against counting by hand."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.small_study import study_config

from rlprior.config import UsageError
from rlprior.data.packing import Corpus
from rlprior.data.prepare import prepare
from rlprior.evaluation.likelihood import (
    HeldOutDocument,
    held_out_documents,
    measure_likelihood,
    unigram_cross_entropy,
)
from rlprior.models.causal_lm import build_model, load_tokenizer

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
    measured = measure_likelihood(
        model, documents, window_tokens=window_tokens, top_k=TOP_K, batch_tokens=batch_tokens
    )
    assert measured["document_ids"] == [document.id for document in documents]
    assert measured["num_bytes"] == [document.num_bytes for document in documents]
    for number, document in enumerate(documents):
        for name, total in one_document(model, document, window_tokens).items():
            # float32 logits near 10, summed over up to 50 tokens; ranks are whole numbers
            assert measured[name][number] == pytest.approx(total, rel=1e-5), (document.id, name)


def test_progress_counts_every_window(model: Any, documents: list[HeldOutDocument]) -> None:
    counts: list[int] = []
    measure_likelihood(
        model, documents, window_tokens=16, top_k=TOP_K, batch_tokens=40, progress=counts.append
    )
    assert sum(counts) == sum(math.ceil((len(document.token_ids) - 1) / 16) for document in documents)
    assert len(counts) > 1


def test_the_mode_of_the_model_is_put_back(model: Any, documents: list[HeldOutDocument]) -> None:
    model.train()
    measure_likelihood(model, documents[:1], window_tokens=16, top_k=TOP_K)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_knows_nothing_has_the_entropy_of_the_vocabulary(model: Any, corpus: Corpus) -> None:
    uniform = build_model(CONFIG.model, load_tokenizer(corpus.tokenizer_directory), max_positions=64, seed=0)
    with torch.no_grad():
        uniform.get_output_embeddings().weight.zero_()
    documents = held_out_documents(corpus, ["sums"], 200)
    measured = measure_likelihood(uniform, documents, window_tokens=16, top_k=TOP_K)
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
