"""The threshold of the head: which logits are among the k largest, ties included.

Shape suffixes: N rows, V vocabulary, B blocks of columns, C candidate columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_TWO_LEVEL_VOCABULARY = 8192  # measured on CPU: below it counting is faster, above it block maxima are
MAX_BLOCK_COLUMNS = 16
NUM_COUNTING_PASSES = 10  # resolves about 95% of rows; the rest take the exact path


def head_threshold(logits_NV: Tensor, top_k: int, scratch_NV: Tensor) -> Tensor:
    """Threshold t [N, 1] such that the head of a row is `{j : z_j >= t}`: its `top_k` largest logits and what ties with them.

    t need not be a logit itself. A logit of -inf is never in the head, and where fewer than `top_k` are finite the head
    is all of them.

    Args:
        logits_NV: float32 or float64, left untouched.
        top_k: at least 1.
        scratch_NV: any contents, same shape and dtype, overwritten.

    >>> logits = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, -torch.inf, -torch.inf, -torch.inf]])
    >>> logits >= head_threshold(logits, 2, torch.empty_like(logits))
    tensor([[ True, False,  True,  True],
            [ True, False, False, False]])
    """
    lowest = torch.finfo(logits_NV.dtype).min
    num_columns = logits_NV.shape[1]
    if top_k >= num_columns:
        return logits_NV.new_full((logits_NV.shape[0], 1), lowest)
    if num_columns < MIN_TWO_LEVEL_VOCABULARY:
        threshold_N = _threshold_by_counting(logits_NV, top_k, scratch_NV)
    else:
        threshold_N = _threshold_by_blocks(logits_NV, top_k)
    return threshold_N[:, None].clamp_min(lowest)


def row_dot(left_NV: Tensor, right_NV: Tensor, scratch_NV: Tensor) -> Tensor:
    """Dot product [N] of each pair of rows, with the product of their elements left in `scratch_NV`."""
    return torch.mul(left_NV, right_NV, out=scratch_NV).sum(1)


def _kth_largest(values_NC: Tensor, k: int) -> Tensor:
    return values_NC.topk(k, dim=1, sorted=False).values.amin(1)


def _threshold_by_counting(logits_NV: Tensor, k: int, scratch_NV: Tensor) -> Tensor:
    """Any value that exactly k logits reach, found by regula falsi on the logarithm of the count.

    A pass that counts costs about a fiftieth of `topk`. The rows in which no such value was found (ties, -inf, or a gap too
    narrow for the passes allowed) are solved exactly, so the passes decide the speed and never the result.
    """
    num_columns = logits_NV.shape[1]
    high_N, low_N = logits_NV.amax(1), logits_NV.amin(1)
    log_high_N = torch.zeros_like(high_N)
    log_low_N = torch.full_like(low_N, math.log(num_columns))
    guess_N = _normal_quantile(logits_NV, 1 - k / num_columns, scratch_NV)
    result_N = torch.full_like(high_N, torch.nan)
    for num_passes in range(1, NUM_COUNTING_PASSES + 1):
        count_N = torch.ge(logits_NV, guess_N[:, None], out=scratch_NV).sum(1)
        result_N = torch.where(count_N == k, guess_N, result_N)
        reached_N = count_N >= k
        log_count_N = count_N.clamp_min(0.5).log()
        low_N, log_low_N = (
            torch.where(reached_N, guess_N, low_N),
            torch.where(reached_N, log_count_N, log_low_N),
        )
        high_N, log_high_N = (
            torch.where(reached_N, high_N, guess_N),
            torch.where(reached_N, log_high_N, log_count_N),
        )
        if num_passes % 4 == 3:  # bisect now and then: interpolation alone may creep from one side
            guess_N = (low_N + high_N) / 2
        else:
            fraction_N = (log_high_N - math.log(k)) / (log_high_N - log_low_N)
            guess_N = torch.lerp(high_N, low_N, fraction_N.clamp(0.02, 0.98))
    unresolved = result_N.isnan().nonzero()[:, 0]
    if unresolved.numel():
        result_N[unresolved] = _kth_largest(logits_NV[unresolved], k)
    return result_N


def _normal_quantile(logits_NV: Tensor, level: float, scratch_NV: Tensor) -> Tensor:
    mean_N = logits_NV.mean(1)
    variance_N = row_dot(logits_NV, logits_NV, scratch_NV) / logits_NV.shape[1] - mean_N.square()
    deviations = math.sqrt(2) * torch.erfinv(torch.tensor(2 * level - 1, dtype=torch.float64)).item()
    return mean_N + deviations * variance_N.clamp_min(0).sqrt()


def _threshold_by_blocks(logits_NV: Tensor, k: int) -> Tensor:
    """The k-th largest logit from the k blocks of columns with the largest maxima.

    Those blocks hold the k largest values: a larger value elsewhere would make its block's maximum larger too.
    Columns j, j + B, j + 2 B, ... form block j, which makes the maxima a vectorised pass.
    """
    num_rows, num_columns = logits_NV.shape
    block_columns = min(MAX_BLOCK_COLUMNS, num_columns // (8 * k))
    if block_columns < 2:
        return _kth_largest(logits_NV, k)
    num_blocks = num_columns // block_columns
    covered = num_blocks * block_columns
    maxima_NB = logits_NV[:, :covered].view(num_rows, block_columns, num_blocks).amax(1)
    blocks_Nk = maxima_NB.topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(block_columns, device=logits_NV.device) * num_blocks
    columns_NC = (blocks_Nk[:, None, :] + offsets[None, :, None]).view(num_rows, -1)
    candidates_NC = torch.cat([logits_NV.gather(1, columns_NC), logits_NV[:, covered:]], dim=1)
    return _kth_largest(candidates_NC, k)
