"""Batched sampling with a key-value cache: prompts prefilled once a group, finished rows dropped as it goes.

The uniform numbers of a sample come from a generator of its own: what it draws does not depend on the other samples of the batch, up to
the rounding of products of more or fewer rows. The same call gives the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlprior.config import RunError
from rlprior.models.onednn import multiplying_with_onednn
from rlprior.sampling.stopping import StopStrings

# R rows (samples), P prompts, T positions, V vocabulary, B steps of a block

UNIFORM_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are drawn.

    Args:
        temperature: divides the logits; above 0.
        top_p: nucleus: the smallest set of most probable tokens whose mass reaches it, in (0, 1]; the token that crosses is kept.
        max_new_tokens: a response that is longer is cut ('length').
        stop: strings of which the first to appear ends a response; it is no part of the answer, but its tokens were drawn.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 4096
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not all(self.stop):
            raise ValueError("stop holds an empty string, which every response begins with; leave it out")


@dataclass(frozen=True)
class Response:
    """One sampled continuation; where `finish_reason` is 'stop', `token_ids` ends with the end-of-text token or what completed a stop string.

    `log_probs` are natural logarithms under the sampling distribution (temperature and nucleus included), one a token.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: Literal["stop", "length"]


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    eos_token_id: int,
    generators: Sequence[Sequence[torch.Generator]],
    decode: Callable[[Sequence[int]], str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[Response]]:
    """Draw as many continuations of each prompt as it has generators.

    Args:
        model: a Hugging Face causal model, in evaluation mode.
        prompts: token ids of each prompt, not empty; lengths may differ.
        decoding: temperature, nucleus, length, stop strings.
        eos_token_id: ends a response.
        generators: of each prompt, one a sample, the same number for all: source of a uniform number a step.
        decode: text of token ids, which stop strings need.
        progress: called with the number of tokens drawn in each step.

    Returns:
        responses[prompt][sample].

    Raises:
        ValueError: a prompt is empty, the generators do not fit the prompts, or stop strings are given without `decode`.
        RunError: the model's logits are not numbers.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty; give it at least one token")
    counts = {len(group) for group in generators}
    if len(generators) != len(prompts) or len(counts) > 1 or 0 in counts:
        raise ValueError(
            f"{len(generators)} lists of {sorted(counts)} generators for {len(prompts)} prompts; give each prompt as many as samples"
        )
    if decoding.stop and decode is None:
        raise ValueError("decoding.stop needs `decode`, the text of token ids")
    stops = StopStrings(decoding.stop, decode) if decode and decoding.stop else None
    by_row = list(itertools.chain.from_iterable(generators))
    with torch.inference_mode(), multiplying_with_onednn(model):
        drawn = _draw_all(model, prompts, by_row, decoding, eos_token_id, stops, progress)
    return _responses(drawn, len(by_row), len(generators[0]), eos_token_id, stops.ended if stops else set())


def _draw_all(
    model: Any,
    prompts: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
    decoding: Decoding,
    eos_token_id: int,
    stops: StopStrings | None,
    progress: Callable[[int], None] | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows, their tokens and log-probabilities, of each step."""
    from rlprior.sampling.cache import repeat_rows

    device = head_device(model)
    num_rows, samples_per_prompt = len(generators), len(generators) // len(prompts)
    ids_PT, mask_PT = _pad_left(prompts, device)
    output = model(
        input_ids=ids_PT,
        attention_mask=mask_PT,
        position_ids=(mask_PT.cumsum(1) - 1).clamp_min(0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = repeat_rows(output.past_key_values, samples_per_prompt)
    logits_RV = output.logits[:, -1].repeat_interleave(samples_per_prompt, 0)
    mask_R = _decoding_mask(model, mask_PT, samples_per_prompt)
    position_R = mask_PT.sum(1).repeat_interleave(samples_per_prompt)
    rows = torch.arange(num_rows)
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []
    uniform_RB = torch.empty(0)
    for step in range(decoding.max_new_tokens):
        if step % UNIFORM_BLOCK == 0:
            uniform_RB = _uniform_block(generators)
        uniform_R = uniform_RB[rows, step % UNIFORM_BLOCK]
        token_R, log_prob_R = draw(logits_RV, uniform_R.to(device), decoding)
        drawn.append((rows, token_R.cpu(), log_prob_R.cpu()))
        if step % UNIFORM_BLOCK == 0 and log_prob_R.isnan().any():
            break  # told below
        if progress:
            progress(len(rows))
        alive_R = token_R != eos_token_id
        if stops:
            alive_R &= ~torch.tensor(stops.read(rows.tolist(), token_R.tolist()), device=device)
        num_alive = int(alive_R.sum())
        if step + 1 == decoding.max_new_tokens or num_alive == 0:
            break
        if num_alive < len(rows):
            kept = _fill_gaps(alive_R)
            cache.batch_select_indices(kept)
            token_R, position_R, rows = token_R[kept], position_R[kept], rows[kept.cpu()]
            mask_R = None if mask_R is None else mask_R[kept]
        output = model(
            input_ids=token_R[:, None],
            # all tokens drawn are seen
            attention_mask=None if mask_R is None else pad(mask_R, (0, step + 1), value=1),
            position_ids=position_R[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits_RV, position_R = output.logits[:, -1], position_R + 1
    return drawn


def _uniform_block(generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform numbers of the next `UNIFORM_BLOCK` steps of every row [R, B], float64."""
    return torch.stack([torch.rand(UNIFORM_BLOCK, generator=one, dtype=torch.float64) for one in generators])


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [P, T] of prompts that end in the same column."""
    longest = max(len(prompt) for prompt in prompts)
    ids_PT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_PT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_PT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_PT[row, longest - len(prompt) :] = 1
    return ids_PT.to(device), mask_PT.to(device)


def _decoding_mask(model: Any, mask_PT: Tensor, samples_per_prompt: int) -> Tensor | None:
    """Which columns of the prompt each row sees; None where no prompt is padded.

    [R, 1, 1, T] where the model hands it to `scaled_dot_product_attention` as it is, which saves a tenth of a step of few rows; [R, T]
    where it makes its own mask of it (a sliding window, distances counted in it).
    """
    if mask_PT.all():
        return None
    mask_RT = mask_PT.bool().repeat_interleave(samples_per_prompt, 0)
    config = getattr(model, "config", None)
    has_one_kind = set(getattr(config, "layer_types", None) or ()) == {"full_attention"}
    takes_ready = has_one_kind and getattr(config, "_attn_implementation", None) == "sdpa"
    return mask_RT[:, None, None] if takes_ready else mask_RT


def head_device(model: Any) -> torch.device:
    """Device of the model's parameters."""
    return next(model.parameters()).device


BLOCK_TOKENS = 32
"""Tokens whose probabilities are summed first: cumulative sums are then taken over V / 32 blocks, and inside one of them."""


def draw(logits_RV: Tensor, uniform_R: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draw of one token a row: the first token whose cumulative probability exceeds the row's uniform number.

    Args:
        logits_RV: next-token logits [R, V].
        uniform_R: in [0, 1) [R], float64: float32 sums of a large vocabulary would never reach some tokens.
        decoding: temperature and nucleus.

    Returns:
        token [R] and its log-probability [R] under the distribution drawn from.
    """
    logits_RV = logits_RV.float()
    if decoding.temperature != 1:
        logits_RV = logits_RV / decoding.temperature
    if decoding.top_p < 1:
        logits_RV = keep_nucleus(torch.log_softmax(logits_RV, -1), decoding.top_p)
    mass_RV = torch.softmax(logits_RV, -1)
    largest_R1 = mass_RV.amax(-1, keepdim=True)
    token_R1 = _invert(mass_RV, uniform_R[:, None])
    # by the most probable token, whose probability never underflows
    log_prob_R1 = logits_RV.gather(1, token_R1) - logits_RV.amax(-1, keepdim=True) + largest_R1.log()
    return token_R1.squeeze(1), log_prob_R1.squeeze(1)


def _invert(mass_RV: Tensor, uniform_R1: Tensor) -> Tensor:
    """The first token [R, 1] whose cumulative mass, in float64, exceeds `uniform` times the whole."""
    num_rows, size = mass_RV.shape
    if size % BLOCK_TOKENS:
        mass_RV = pad(mass_RV, (0, -size % BLOCK_TOKENS))
    mass_RBN = mass_RV.double().view(num_rows, -1, BLOCK_TOKENS)
    until_RB = mass_RBN.sum(-1).cumsum(-1)
    goal_R1 = uniform_R1 * until_RB[:, -1:]
    block_R1 = _first_above(until_RB, goal_R1)
    before_R1 = torch.where(block_R1 > 0, until_RB.gather(1, (block_R1 - 1).clamp_min(0)), 0.0)
    inside_RN = mass_RBN[torch.arange(num_rows, device=mass_RV.device), block_R1.squeeze(1)].cumsum(-1)
    # sums in another order: what the block holds may round to less than what is left of the goal
    left_R1 = torch.minimum(
        goal_R1 - before_R1, torch.nextafter(inside_RN[:, -1:], torch.zeros_like(goal_R1))
    )
    place_R1 = _first_above(inside_RN, left_R1)
    return (block_R1 * BLOCK_TOKENS + place_R1).clamp_max(size - 1)


def _first_above(cumulative_RN: Tensor, goal_R1: Tensor) -> Tensor:
    """Place [R, 1] of the first sum above the goal, the last place where the goal is not a number."""
    place_R1 = torch.searchsorted(cumulative_RN, goal_R1.contiguous(), right=True)
    return place_R1.clamp_max(cumulative_RN.shape[-1] - 1)


def keep_nucleus(log_probs_RV: Tensor, top_p: float) -> Tensor:
    """Renormalised log-probabilities of the nucleus, -inf outside. Source: Holtzman et al. 2019, section 3.1."""
    sorted_RV, order_RV = torch.sort(log_probs_RV, dim=-1, descending=True, stable=True)
    mass_before_RV = sorted_RV.exp().cumsum(-1) - sorted_RV.exp()
    sorted_RV = sorted_RV.masked_fill(mass_before_RV >= top_p, -torch.inf)
    kept_RV = torch.full_like(log_probs_RV, -torch.inf).scatter_(-1, order_RV, sorted_RV)
    return torch.log_softmax(kept_RV, -1)


def _responses(
    drawn: Sequence[tuple[Tensor, Tensor, Tensor]],
    num_rows: int,
    samples_per_prompt: int,
    eos_token_id: int,
    ended: Set[int],
) -> list[list[Response]]:
    """Groups of responses, from the rows, tokens and log-probabilities of each step."""
    rows, tokens, log_probs = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    if log_probs.isnan().any():
        raise RunError(
            "sampling: the model's logits are not numbers; its weights have diverged or are damaged"
        )
    order = torch.sort(rows, stable=True).indices
    lengths = torch.bincount(rows, minlength=num_rows).tolist()
    responses = [
        Response(
            ids.tolist(),
            values.tolist(),
            "stop" if ids[-1] == eos_token_id or row in ended else "length",
        )
        for row, (ids, values) in enumerate(
            zip(tokens[order].split(lengths), log_probs[order].split(lengths), strict=True)
        )
    ]
    return [responses[i : i + samples_per_prompt] for i in range(0, num_rows, samples_per_prompt)]


def _fill_gaps(alive_R: Tensor) -> Tensor:
    """Indices of the rows alive, in which each row is where it was or, from behind, in the place of one that has ended.

    >>> _fill_gaps(torch.tensor([True, False, True, False, True])).tolist()
    [0, 4, 2]
    """
    num_alive = int(alive_R.sum())
    kept = torch.arange(num_alive, device=alive_R.device)
    kept[~alive_R[:num_alive]] = num_alive + alive_R[num_alive:].nonzero().squeeze(1)
    return kept
