"""Batched sampling with a key-value cache: prompts prefilled once a group, finished rows dropped as it goes.

The uniform numbers of a prompt's samples come from a generator of its own: what they draw does not depend on the other prompts of the
batch, rounding apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlprior.config import RunError

# R rows (samples), P prompts, T positions, V vocabulary, B steps of a block

UNIFORM_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are drawn.

    Args:
        temperature: divides the logits; above 0.
        top_p: nucleus: the smallest set of most probable tokens whose mass reaches it, in (0, 1]; the token that crosses is kept.
        max_new_tokens: a response that is longer is cut ('length').
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 4096

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")


@dataclass(frozen=True)
class Response:
    """One sampled continuation; `token_ids` ends with the end-of-text token where `finish_reason` is 'stop'.

    `log_probs` are natural logarithms under the sampling distribution (temperature and nucleus included), one a token.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: Literal["stop", "length"]


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    decoding: Decoding,
    eos_token_id: int,
    generators: Sequence[torch.Generator],
    progress: Callable[[int], None] | None = None,
) -> list[list[Response]]:
    """Draw `samples_per_prompt` continuations of each prompt.

    Args:
        model: a Hugging Face causal model, in evaluation mode.
        prompts: token ids of each prompt, not empty; lengths may differ.
        samples_per_prompt: group size.
        decoding: temperature, nucleus, length.
        eos_token_id: ends a response.
        generators: one a prompt: source of the uniform numbers of its samples, one a sample and step.
        progress: called with the number of tokens drawn in each step.

    Returns:
        responses[prompt][sample].

    Raises:
        ValueError: a prompt is empty, or there are not as many generators as prompts.
        RunError: the model's logits are not numbers.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty; give it at least one token")
    if len(generators) != len(prompts):
        raise ValueError(f"{len(generators)} generators for {len(prompts)} prompts")
    device = head_device(model)
    num_rows = len(prompts) * samples_per_prompt
    ids_PT, mask_PT = _pad_left(prompts, device)
    output = model(
        input_ids=ids_PT,
        attention_mask=mask_PT,
        position_ids=(mask_PT.cumsum(1) - 1).clamp_min(0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples_per_prompt)
    logits_RV = output.logits[:, -1].repeat_interleave(samples_per_prompt, 0)
    mask_RT = mask_PT.repeat_interleave(samples_per_prompt, 0)
    position_R = mask_RT.sum(1)
    rows = torch.arange(num_rows)
    drawn = torch.full((num_rows, decoding.max_new_tokens), -1, dtype=torch.long)
    log_probs = torch.zeros(num_rows, decoding.max_new_tokens)
    uniform_RB = torch.empty(0)
    for step in range(decoding.max_new_tokens):
        if step % UNIFORM_BLOCK == 0:
            uniform_RB = _uniform_block(generators, samples_per_prompt)
        uniform_R = uniform_RB[rows, step % UNIFORM_BLOCK]
        token_R, log_prob_R = draw(logits_RV, uniform_R.to(device), decoding)
        drawn[rows, step], log_probs[rows, step] = token_R.cpu(), log_prob_R.cpu()
        if progress:
            progress(len(rows))
        alive = (token_R != eos_token_id).nonzero().squeeze(1)
        if step + 1 == decoding.max_new_tokens or len(alive) == 0:
            break
        if len(alive) < len(rows):
            cache.batch_select_indices(alive)
            token_R, mask_RT, position_R = token_R[alive], mask_RT[alive], position_R[alive]
            rows = rows[alive.cpu()]
        mask_RT = torch.cat([mask_RT, mask_RT.new_ones(len(rows), 1)], 1)
        output = model(
            input_ids=token_R[:, None],
            attention_mask=mask_RT,
            position_ids=position_R[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits_RV, position_R = output.logits[:, -1], position_R + 1
    if log_probs.isnan().any():
        raise RunError(
            "sampling: the model's logits are not numbers; its weights have diverged or are damaged"
        )
    responses = [_response(drawn[row], log_probs[row], eos_token_id) for row in range(num_rows)]
    return [responses[i : i + samples_per_prompt] for i in range(0, num_rows, samples_per_prompt)]


def _uniform_block(generators: Sequence[torch.Generator], samples_per_prompt: int) -> Tensor:
    """Uniform numbers of the next `UNIFORM_BLOCK` steps of every row [R, B], float64."""
    shape = (samples_per_prompt, UNIFORM_BLOCK)
    return torch.cat([torch.rand(shape, generator=one, dtype=torch.float64) for one in generators])


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [P, T] of prompts that end in the same column."""
    longest = max(len(prompt) for prompt in prompts)
    ids_PT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_PT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_PT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_PT[row, longest - len(prompt) :] = 1
    return ids_PT.to(device), mask_PT.to(device)


def head_device(model: Any) -> torch.device:
    """Device of the model's parameters."""
    return next(model.parameters()).device


def draw(logits_RV: Tensor, uniform_R: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draw of one token a row: the first token whose cumulative probability exceeds the row's uniform number.

    Args:
        logits_RV: next-token logits [R, V].
        uniform_R: in [0, 1) [R], float64: float32 sums of a large vocabulary would never reach some tokens.
        decoding: temperature and nucleus.

    Returns:
        token [R] and its log-probability [R] under the distribution drawn from.
    """
    log_probs_RV = torch.log_softmax(logits_RV.float() / decoding.temperature, -1)
    if decoding.top_p < 1:
        log_probs_RV = keep_nucleus(log_probs_RV, decoding.top_p)
    cumulative_RV = log_probs_RV.double().exp_().cumsum(-1)
    total_R1 = cumulative_RV[:, -1:].contiguous()
    token_R1 = torch.searchsorted(cumulative_RV, uniform_R[:, None] * total_R1, right=True)
    # u is at most 1 - 2^-53, and its product with the total then rounds to less than the total: the token found has mass; but
    # not-a-number is past every sum; the last token then carries it to the caller
    token_R1 = token_R1.clamp_max(logits_RV.shape[-1] - 1)
    return token_R1.squeeze(1), log_probs_RV.gather(1, token_R1).squeeze(1)


def keep_nucleus(log_probs_RV: Tensor, top_p: float) -> Tensor:
    """Renormalised log-probabilities of the nucleus, -inf outside. Source: Holtzman et al. 2019, section 3.1."""
    sorted_RV, order_RV = torch.sort(log_probs_RV, dim=-1, descending=True, stable=True)
    mass_before_RV = sorted_RV.exp().cumsum(-1) - sorted_RV.exp()
    sorted_RV = sorted_RV.masked_fill(mass_before_RV >= top_p, -torch.inf)
    kept_RV = torch.full_like(log_probs_RV, -torch.inf).scatter_(-1, order_RV, sorted_RV)
    return torch.log_softmax(kept_RV, -1)


def _response(tokens: Tensor, log_probs: Tensor, eos_token_id: int) -> Response:
    token_ids = [token for token in tokens.tolist() if token >= 0]
    stopped = token_ids[-1] == eos_token_id
    return Response(token_ids, log_probs[: len(token_ids)].tolist(), "stop" if stopped else "length")
