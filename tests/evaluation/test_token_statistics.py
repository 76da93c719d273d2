"""Summaries of tokens against float64 brute force over dense distributions, and calibration and quantiles by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rlprior.evaluation.token_statistics import (
    calibration_error,
    forking_threshold,
    share_above,
    summarise_tokens,
)
from rlprior.models.likelihood import TokenMeasurements

TOP_K = 5


def dense(num_tokens: int = 400, vocab_size: int = 50) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    logits = random.normal(size=(num_tokens, vocab_size)) * random.uniform(0.2, 4, size=(num_tokens, 1))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = np.array([random.choice(vocab_size, p=row) for row in p])
    return p, targets


def measurements(p: Any, targets: Any) -> TokenMeasurements:
    target_p = p[np.arange(len(p)), targets]
    return TokenMeasurements(
        document_ids=("a", "b"),
        num_tokens=np.array([150, len(p) - 150]),
        num_bytes=np.array([500, 900]),
        top_k=TOP_K,
        cross_entropy_nats=-np.log(target_p).astype(np.float32),
        entropy_nats=-(p * np.log(p)).sum(1).astype(np.float32),
        head_mass=np.sort(p, 1)[:, -TOP_K:].sum(1).astype(np.float32),
        target_rank=(1 + (p > target_p[:, None]).sum(1)).astype(np.float32),
        top_prob=p.max(1).astype(np.float32),
    )


def test_every_number_by_brute_force() -> None:
    p, targets = dense()
    found = summarise_tokens(measurements(p, targets), fork_threshold_nats=1.5, num_bins=10)
    n = len(p)
    nats = [-math.log(row[target]) for row, target in zip(p, targets, strict=True)]
    entropy = [-sum(x * math.log(x) for x in row) for row in p]
    ranks = [1 + sum(x > row[target] for x in row) for row, target in zip(p, targets, strict=True)]
    head = [sum(sorted(row)[-TOP_K:]) for row in p]
    error = 0.0
    for b in range(10):
        inside = [i for i in range(n) if b / 10 < max(p[i]) <= (b + 1) / 10]
        right = sum(ranks[i] == 1 for i in inside)
        error += abs(right - sum(max(p[i]) for i in inside)) / n
    expected = {
        "num_documents": 2,
        "num_tokens": n,
        "num_bytes": 1400,
        "cross_entropy_nats": sum(nats) / n,
        "perplexity": math.exp(sum(nats) / n),
        "bits_per_byte": sum(nats) / math.log(2) / 1400,
        "entropy_nats": sum(entropy) / n,
        "fork_threshold_nats": 1.5,
        "fork_share": sum(h > 1.5 for h in entropy) / n,
        "top_k": TOP_K,
        "head_mass": sum(head) / n,
        "tail_mass": 1 - sum(head) / n,
        "confidence": sum(max(row) for row in p) / n,
        "accuracy": sum(rank == 1 for rank in ranks) / n,
        "calibration_error": error,
        "num_calibration_bins": 10,
        "target_rank_median": float(np.median(ranks)),
        "top1_share": sum(rank == 1 for rank in ranks) / n,
        "top_k_share": sum(rank <= TOP_K for rank in ranks) / n,
    }
    quantiles = found.pop("entropy_quantiles_nats")
    assert found.pop("fork_threshold") == "given"
    # inputs are rounded to float32
    assert found == pytest.approx(expected, rel=1e-6)
    assert quantiles[::100] == pytest.approx(np.quantile(entropy, np.linspace(0, 1, 11)), rel=1e-6)
    assert share_above(quantiles, 1.5) == pytest.approx(found["fork_share"], abs=0.001 + 1 / n)


def test_a_models_own_threshold_says_so_and_leaves_a_fifth_above() -> None:
    found = summarise_tokens(measurements(*dense()))
    assert found["fork_threshold"] == "own 80th percentile"
    assert found["fork_threshold_nats"] == forking_threshold(found["entropy_quantiles_nats"])
    assert found["fork_share"] == 0.2


def test_a_calibrated_model_has_no_error_and_a_sure_one_has_its_mistakes() -> None:
    """Of a model drawn from itself the gaps of 15 bins are sampling noise: each about sqrt(n_b / 4), N = 200,000."""
    random = np.random.default_rng(0)
    confidence = random.uniform(0.05, 1, 200_000)
    is_right = random.random(200_000) < confidence
    assert calibration_error(confidence, is_right) < 15 * 3 * math.sqrt(200_000 / 15 / 4) / 200_000
    assert calibration_error(np.ones(4), np.array([True, True, True, False])) == 0.25
    assert calibration_error(np.full(4, 0.2), np.array([True] * 4), num_bins=5) == pytest.approx(0.8)


def test_bins_include_their_upper_end() -> None:
    """With B = 2, 0.5 is in the lower bin: errors of two bins add up, those of one bin cancel."""
    confidence, is_right = np.array([0.5, 0.7]), np.array([True, False])
    assert calibration_error(confidence, is_right, num_bins=2) == pytest.approx((0.5 + 0.7) / 2)
    assert calibration_error(confidence, is_right, num_bins=1) == pytest.approx(0.2 / 2)


@pytest.mark.parametrize(("threshold", "share"), [(-1, 1.0), (0, 0.5), (0.5, 0.375), (2, 0.0), (5, 0.0)])
def test_shares_above_a_threshold_where_quantiles_are_equal(threshold: float, share: float) -> None:
    """Half of the tokens at 0, the others even between 0 and 2."""
    assert share_above([0.0, 0.0, 0.0, 1.0, 2.0], threshold) == share


def test_nothing_to_summarise_is_refused() -> None:
    empty = measurements(*(one[:0] for one in dense()))
    object.__setattr__(empty, "num_tokens", np.array([0, 0]))
    with pytest.raises(ValueError, match="no predicted token"):
        summarise_tokens(empty)
