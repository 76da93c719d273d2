"""What the measurements of many tokens come to: means, quantiles, calibration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from rlprior.models.likelihood import TokenMeasurements

QUANTILE_STEPS = 1000
"""Entropy quantiles are kept at so many even steps: a share of tokens read off them is right within one step, 0.001."""
FORKING_QUANTILE = 0.8
NUM_CALIBRATION_BINS = 15


def summarise_tokens(
    tokens: TokenMeasurements,
    *,
    fork_threshold_nats: float | None = None,
    num_bins: int = NUM_CALIBRATION_BINS,
) -> dict[str, Any]:
    """One model's predictions of one set of documents, as plain data.

    Args:
        tokens: at least one.
        fork_threshold_nats: a token forks where its entropy is above this: the 80th percentile of a baseline's, measured on the same
            documents, compares models. None takes this model's own 80th percentile, which says where it forks and not how often.
        num_bins: of the calibration, at least 1.

    Returns:
        num_documents, num_tokens, num_bytes; cross_entropy_nats (mean), perplexity, bits_per_byte; entropy_nats (mean),
        entropy_quantiles_nats (at 0, 0.001, ..., 1); fork_threshold_nats, fork_threshold ("given" or "own 80th percentile"), fork_share;
        top_k, head_mass, tail_mass (1 - head_mass); confidence (mean), accuracy, calibration_error, num_calibration_bins;
        target_rank_median, top1_share, top_k_share (targets of rank 1, and of rank at most top_k).

    Raises:
        ValueError: there is no token.

    Source: forking tokens are those of Wang et al. 2025, "Beyond the 80/20 rule", by entropy of the whole distribution.
    """
    num_tokens = int(tokens.num_tokens.sum())
    if num_tokens == 0:
        raise ValueError("no predicted token to summarise")
    nats = float(tokens.cross_entropy_nats.sum(dtype=np.float64))
    num_bytes = int(tokens.num_bytes.sum())
    entropy = tokens.entropy_nats.astype(np.float64)
    quantiles = np.quantile(entropy, np.linspace(0, 1, QUANTILE_STEPS + 1))
    is_own = fork_threshold_nats is None
    threshold = forking_threshold(quantiles.tolist()) if fork_threshold_nats is None else fork_threshold_nats
    is_top1 = tokens.target_rank == 1
    head_mass = float(tokens.head_mass.mean(dtype=np.float64))
    return {
        "num_documents": len(tokens.document_ids),
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "cross_entropy_nats": nats / num_tokens,
        "perplexity": math.exp(min(nats / num_tokens, 700.0)),
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "entropy_nats": float(entropy.mean()),
        "entropy_quantiles_nats": quantiles.tolist(),
        "fork_threshold_nats": threshold,
        "fork_threshold": "own 80th percentile" if is_own else "given",
        "fork_share": float((entropy > threshold).mean()),
        "top_k": tokens.top_k,
        "head_mass": head_mass,
        "tail_mass": 1 - head_mass,
        "confidence": float(tokens.top_prob.mean(dtype=np.float64)),
        "accuracy": float(is_top1.mean()),
        "calibration_error": calibration_error(tokens.top_prob, is_top1, num_bins),
        "num_calibration_bins": num_bins,
        "target_rank_median": float(np.median(tokens.target_rank)),
        "top1_share": float(is_top1.mean()),
        "top_k_share": float((tokens.target_rank <= tokens.top_k).mean()),
    }


def calibration_error(
    confidence: npt.NDArray[Any], is_right: npt.NDArray[np.bool_], num_bins: int = NUM_CALIBRATION_BINS
) -> float:
    """Expected calibration error of the most probable token.

    ECE = sum_b n_b / N |accuracy_b - confidence_b| over bins ((b - 1) / B, b / B], means within each

    Args:
        confidence: [N] its probability, in (0, 1].
        is_right: [N] whether it is what followed.
        num_bins: B, of equal width.

    Source: Guo et al. 2017, "On calibration of modern neural networks", Eq. 3, whose B is 15.

    >>> calibration_error(np.array([0.9, 0.9, 0.2]), np.array([True, False, False]), num_bins=2)
    0.3333333333333333
    """
    confidence = confidence.astype(np.float64)
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=is_right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def forking_threshold(quantiles_nats: list[float]) -> float:
    """The 80th percentile of entropies kept as even quantiles: above it a baseline's tokens fork."""
    return quantiles_nats[round(FORKING_QUANTILE * (len(quantiles_nats) - 1))]


def share_above(quantiles_nats: list[float], threshold_nats: float) -> float:
    """Share of tokens whose entropy is above a threshold, from quantiles at even steps; right within one step.

    >>> share_above([0.0, 1.0, 2.0, 3.0, 4.0], 3.5)
    0.125
    """
    quantiles = np.asarray(quantiles_nats)
    if threshold_nats >= quantiles[-1]:
        return 0.0
    if threshold_nats < quantiles[0]:
        return 1.0
    # of equal quantiles, the last: what equals the threshold is not above it
    place = int(np.searchsorted(quantiles, threshold_nats, side="right")) - 1
    inside = (threshold_nats - quantiles[place]) / (quantiles[place + 1] - quantiles[place])
    return float(1 - (place + inside) / (len(quantiles) - 1))
