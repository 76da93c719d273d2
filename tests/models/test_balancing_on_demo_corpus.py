"""The demo's corpus and recipe with `tiny-moe` in the place of `tiny`: the load evens out and stays even, with the bias only."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import rlprior.study
from rlprior.config import load_config
from rlprior.data.packing import IGNORE_INDEX, Corpus, PackedMixture, attention_mask
from rlprior.data.prepare import prepare
from rlprior.models.balancing import ExpertBalancer
from rlprior.models.causal_lm import build_model, head_weight, load_tokenizer, packed_hidden_states
from rlprior.study.config import StudyConfig
from rlprior.training.schedule import learning_rate

NUM_STEPS, WINDOW_STEPS = 600, 40
DEMO = load_config(StudyConfig, Path(rlprior.study.__path__[0]) / "demo.toml")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("demo") / "corpus"
    prepare(DEMO.data, directory)
    return Corpus.open(directory)


def violations(corpus: Corpus, rate: float) -> list[float]:
    """MaxVio, mean over layers and over the 40,960 tokens of each window of the training."""
    training = DEMO.pretrain
    tokenizer = load_tokenizer(corpus.tokenizer_directory)
    config = dataclasses.replace(DEMO.model, preset="tiny-moe")
    model = build_model(config, tokenizer, max_positions=training.sequence_length, seed=0).train()
    balancer = ExpertBalancer.attach(model, rate=rate)
    mixture = PackedMixture(corpus, training.mixture, training.sequence_length, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = training.batch_tokens // training.sequence_length
    found: list[float] = []
    for step in range(1, NUM_STEPS + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(training.schedule, step, NUM_STEPS)
        batch = mixture.batch((step - 1) * rows, rows)
        mask = attention_mask(batch.document_ids)
        hidden = packed_hidden_states(model, batch.input_ids, batch.position_ids, mask)
        logits = hidden @ head_weight(model).T
        functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX
        ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(balancer.update()["max_violation_mean"])
    windows = torch.tensor(found).view(-1, WINDOW_STEPS).mean(1).tolist()
    print(f"rate {rate}:", " ".join(f"{value:.2f}" for value in windows))
    return windows


@pytest.mark.slow
def test_the_violation_falls_below_a_half_and_stays(corpus: Corpus) -> None:
    windows = violations(corpus, DEMO.model.balancing_rate)
    assert windows[0] > 1
    first_even = next(number for number, value in enumerate(windows) if value < 0.5)
    assert len(windows) - first_even > 5
    assert max(windows[first_even:]) < 0.5


@pytest.mark.slow
def test_without_the_bias_it_does_not(corpus: Corpus) -> None:
    assert min(violations(corpus, 0.0)) > 1
