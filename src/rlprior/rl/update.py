"""One GRPO update on whole groups, shared out among the processes of a world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlprior.models.causal_lm import head_weight
from rlprior.objectives import CrossEntropy, linear_shaped_cross_entropy
from rlprior.rl.config import RLConfig
from rlprior.rl.grpo import aggregation_weights, clipped_policy_loss, group_advantages, truncated_importance
from rlprior.rl.rollout import Group, rewards_of
from rlprior.sampling.sampler import Response
from rlprior.training.engine import autocast
from rlprior.training.update import Updater
from rlprior.world import ALONE, World

ENTROPY_CHUNK_TOKENS = 1024

# R rows (responses), T positions, N response tokens, D features, V vocabulary


@dataclass(frozen=True)
class TrainingRow:
    """One response with what its tokens count: `weight` each, 0 where the response is masked."""

    prompt_ids: list[int]
    response: Response
    advantage: float
    weight: float

    @property
    def num_positions(self) -> int:
        """Length of prompt and response."""
        return len(self.prompt_ids) + len(self.response.token_ids)


@dataclass(frozen=True)
class PaddedRows:
    """Prompt and response of each row, padded on the right, which causal attention never looks at.

    `targets_RT[r, t]` is the response token that follows position t, -100 elsewhere.
    """

    input_ids_RT: Tensor
    targets_RT: Tensor


class PolicyLogProbs(nn.Module):
    """A Hugging Face causal model whose forward gives what a policy loss needs, so that a wrapper sees the head's weight being used."""

    def __init__(self, model: Any, autocast_dtype: torch.dtype | None = None) -> None:
        """Wrap `model`; matrix products are in `autocast_dtype` where one is given."""
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast_dtype

    def forward(
        self, batch: PaddedRows, *, temperature: float, differentiable_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy at `temperature` of every response token, row after row [N].

        Gradients flow to the former, and to the latter where asked for.
        """
        device = next(self.model.parameters()).device
        targets_RT = batch.targets_RT.to(device)
        mask_RT = targets_RT != -100
        with autocast(device, self.autocast_dtype):
            hidden_RTD = self.model.model(
                input_ids=batch.input_ids_RT.to(device), use_cache=False
            ).last_hidden_state
            hidden_ND, head_VD = hidden_RTD[mask_RT] / temperature, head_weight(self.model)
            nll_N, metrics = linear_shaped_cross_entropy(
                hidden_ND, head_VD, targets_RT[mask_RT], CrossEntropy(), reduction="none", return_metrics=True
            )
            entropy_N = _entropy(hidden_ND, head_VD) if differentiable_entropy else metrics.entropy
        return -nll_N, entropy_N


def _entropy(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    """Entropy of the softmax of `hidden @ head.T` [N], with gradient; logits are computed again in the backward pass, chunk by chunk."""

    def entropy(chunk_ND: Tensor, head_VD: Tensor) -> Tensor:
        log_probs_NV = nn.functional.linear(chunk_ND, head_VD).float().log_softmax(-1)
        return -(log_probs_NV.exp() * log_probs_NV).sum(-1)

    chunks = hidden_ND.split(ENTROPY_CHUNK_TOKENS)
    return torch.cat([checkpoint(entropy, chunk, head_VD, use_reentrant=False) for chunk in chunks])


def policy_update(
    module: PolicyLogProbs,
    updater: Updater,
    groups: Sequence[Group],
    config: RLConfig,
    *,
    rate: float,
    step: int,
    world: World = ALONE,
) -> dict[str, float]:
    """One GRPO update; gradients do not depend on the micro-batches or the number of processes.

    Args:
        module: the policy.
        updater: of its parameters.
        groups: what is trained on, the same in every process of the world.
        config: of the run.
        rate: learning rate.
        step: of the run; the length schedule and error messages go by it.
        world: whole groups go to each process.

    Returns:
        Nothing, and no update, where no token has an advantage. Otherwise loss; gradient_norm; entropy_nats (mean over response tokens of
        the policy's entropy at the rollout's temperature); clip_share; max_ratio_deviation (largest |ratio - 1|); and of the difference between the trainer's and the sampler's log-probabilities,
        sampler_gap_nats (largest) and sampler_kl_nats (mean of ratio - 1 - log ratio, Schulman's estimate of KL(sampler || trainer)).
    """
    rows_of_groups = _training_rows(groups, config, step)
    all_rows = [row for rows in rows_of_groups for row in rows]
    if not config.entropy_bonus and not any(row.weight * row.advantage for row in all_rows):
        return {}
    rows_by_rank = share_out(rows_of_groups, world.size)
    # every process takes part in each collective call: those with fewer rows end with empty batches
    num_batches = max(-(-len(rows) // config.micro_batch_rows) for rows in rows_by_rank)
    rows = rows_by_rank[world.rank]
    num_tokens = sum(len(row.response.token_ids) for row in all_rows)
    num_counted = sum(len(row.response.token_ids) for row in all_rows if row.weight)
    sums = {"loss": 0.0, "entropy_nats": 0.0, "clip_share": 0.0, "sampler_kl_nats": 0.0}
    largest = {"max_ratio_deviation": 0.0, "sampler_gap_nats": 0.0}
    for number in range(num_batches):
        batch = rows[number * config.micro_batch_rows : (number + 1) * config.micro_batch_rows]
        loss, batch_sums, batch_largest = loss_of_rows(module, batch, config, num_counted)
        # sharding averages gradients over the processes; the product with their number makes it the sum
        (loss * world.size).backward()
        sums["loss"] += float(loss.detach())
        for name, value in batch_sums.items():
            sums[name] += value / num_tokens
        largest = _largest([largest, batch_largest])
    sums = world.sum(sums)
    largest = _largest(world.gather(largest))
    return {**sums, **largest, "gradient_norm": updater.apply(sums["loss"], rate, step=step)}


def _largest(of_parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest value of each name; what is not a number stays to be seen."""
    return {name: float(np.max([part[name] for part in of_parts])) for name in of_parts[0]}


def _training_rows(groups: Sequence[Group], config: RLConfig, step: int) -> list[list[TrainingRow]]:
    """The rows of each group."""
    advantages_PG = group_advantages(rewards_of(groups), config.scale_rewards)
    if config.signal != "both":
        advantages_PG = (
            advantages_PG.clamp_min(0) if config.signal == "positive" else advantages_PG.clamp_max(0)
        )
    counted = [
        0 if config.mask_truncated and response.finish_reason == "length" else len(response.token_ids)
        for group in groups
        for response in group.responses
    ]
    weights = aggregation_weights(
        torch.tensor(counted), config.loss_aggregation, config.max_new_tokens(step)
    ).tolist()
    of_row = iter([weight if count else 0.0 for weight, count in zip(weights, counted, strict=True)])
    return [
        [
            TrainingRow(group.prompt_ids, response, advantage, next(of_row))
            for response, advantage in zip(group.responses, advantages, strict=True)
        ]
        for group, advantages in zip(groups, advantages_PG.tolist(), strict=True)
    ]


def share_out(groups: Sequence[Sequence[TrainingRow]], num_shares: int) -> list[list[TrainingRow]]:
    """Whole groups to each share, the longest first to the share with the fewest positions so far; rows of like length together."""
    shares: list[list[TrainingRow]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    lengths = [sum(row.num_positions for row in group) for group in groups]
    for index in sorted(range(len(groups)), key=lambda index: (-lengths[index], index)):
        lightest = loads.index(min(loads))
        shares[lightest] += groups[index]
        loads[lightest] += lengths[index]
    return [sorted(share, key=lambda row: row.num_positions) for share in shares]


def loss_of_rows(
    module: PolicyLogProbs, rows: Sequence[TrainingRow], config: RLConfig, num_counted: int
) -> tuple[Tensor, dict[str, float], dict[str, float]]:
    """This batch's part of the loss, with sums over its tokens and largest values."""
    log_probs_N, entropy_N = module(
        _pad(rows) if rows else _no_rows(),
        temperature=config.temperature,
        differentiable_entropy=config.entropy_bonus > 0,
    )
    device = log_probs_N.device
    lengths = torch.tensor([len(row.response.token_ids) for row in rows], dtype=torch.long)

    def spread(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(lengths).float().to(device)

    sampler_N = torch.tensor([nats for row in rows for nats in row.response.log_probs], device=device)
    old_N = log_probs_N.detach() if config.old_log_probs == "trainer" else sampler_N
    weights_N = spread([row.weight for row in rows])
    is_counted_N = weights_N > 0
    if config.importance_cap is not None:
        weights_N = weights_N * truncated_importance(log_probs_N, sampler_N, config.importance_cap)
    result = clipped_policy_loss(
        log_probs_N,
        old_N,
        spread([row.advantage for row in rows]),
        weights_N,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    loss = result.loss
    if config.entropy_bonus > 0:
        loss = loss - config.entropy_bonus * (entropy_N * is_counted_N).sum() / max(num_counted, 1)
    gap_N = log_probs_N.detach().double() - sampler_N.double()
    sums = {
        "entropy_nats": float(entropy_N.detach().double().sum()),
        "clip_share": float(result.num_clipped),
        "sampler_kl_nats": float((gap_N.expm1() - gap_N).sum()),
    }
    gap = float(gap_N.abs().max()) if len(gap_N) else 0.0
    return loss, sums, {"max_ratio_deviation": result.max_ratio_deviation, "sampler_gap_nats": gap}


def _pad(rows: Sequence[TrainingRow]) -> PaddedRows:
    longest = max(row.num_positions for row in rows) - 1
    inputs_RT = torch.zeros(len(rows), longest, dtype=torch.long)
    targets_RT = torch.full((len(rows), longest), -100)
    for place, row in enumerate(rows):
        ids = torch.tensor([*row.prompt_ids, *row.response.token_ids])
        inputs_RT[place, : len(ids) - 1] = ids[:-1]
        targets_RT[place, len(row.prompt_ids) - 1 : len(ids) - 1] = ids[len(row.prompt_ids) :]
    return PaddedRows(inputs_RT, targets_RT)


def _no_rows() -> PaddedRows:
    """One position without a target: a pass that takes part and counts nothing."""
    return PaddedRows(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), -100))
