"""Reinforcement learning with verifiable rewards: roll out, keep the groups that teach, update once, repeat.

Differs: the paper runs thousands of tokens a response on a cluster; this is the same algorithm on one process, with the sampler built in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlprior.models.causal_lm import head_weight, load_model, load_tokenizer
from rlprior.models.onednn import is_onednn_faster, multiply_with_onednn
from rlprior.objectives import CrossEntropy, linear_shaped_cross_entropy
from rlprior.rl.config import RLConfig
from rlprior.rl.grpo import clipped_policy_loss, group_advantages
from rlprior.rl.rollout import Group, PromptStream, collect_rollout, rewards_of, rollout_metrics
from rlprior.runs import Run, RunStopped, catch_termination
from rlprior.tasks.config import load_task
from rlprior.training.checkpoint import (
    CheckpointSaver,
    last_good_checkpoint,
    remove_leftovers,
    restore_optimizer,
    tokens_seen,
)
from rlprior.training.schedule import ScheduleConfig, learning_rate
from rlprior.training.update import Updater

CODE = (
    "rlprior.rl",
    "rlprior.data.tokenizer",
    "rlprior.tasks",
    "rlprior.objectives",
    "rlprior.models",
    "rlprior.training.checkpoint",
    "rlprior.training.schedule",
    "rlprior.training.update",
    "rlprior.seeding",
)

# R rows (responses), T positions, N response tokens


@dataclass(frozen=True, kw_only=True)
class RLRunConfig:
    """A run of reinforcement learning.

    Args:
        rl: what it does.
        init_from: Hugging Face folder of the policy to start from.
        seed: of prompt order and sampling.
        data_dir: folder that the task's relative paths start from.
    """

    rl: RLConfig
    init_from: str
    seed: int = 0
    data_dir: str | None = None


def run(config: RLRunConfig, run: Run) -> Path:
    """Train, from the newest good checkpoint if there is one. Returns the folder of the last checkpoint.

    Raises:
        RunStopped: SIGTERM came; the step in progress has been finished and saved.
    """
    if run.result is not None:
        return run.directory / run.result["checkpoint"]
    rl, start = config.rl, Path(config.init_from)
    remove_leftovers(run.directory)
    checkpoint = last_good_checkpoint(run.directory)
    longest = rl.max_new_tokens(rl.num_steps) + 1024
    model: Any = load_model(checkpoint.directory if checkpoint else start, max_positions=longest).train()
    if is_onednn_faster():
        multiply_with_onednn(model)
    tokenizer = load_tokenizer(start)
    prompts = PromptStream(_training_problems(config), tokenizer, config.seed)
    updater = Updater(model, rl.optimizer)
    saver = CheckpointSaver(
        run.directory,
        model=model,
        tokenizer_directory=start,
        optimizer=updater.optimizer,
        is_milestone=rl.is_milestone,
    )
    state: dict[str, Any] = {"cursor": 0, "tokens": tokens_seen(start), "num_empty": 0, **updater.counters}
    first_step = 1
    if checkpoint:
        restore_optimizer(checkpoint.directory, model, updater.optimizer)
        state, first_step = dict(checkpoint.state), checkpoint.step + 1
        updater.restore_counters(state)
    run.resume_metrics(first_step - 1)
    schedule = ScheduleConfig(
        peak_learning_rate=rl.learning_rate, final_learning_rate=0.0, warmup_steps=rl.warmup_steps
    )
    last = checkpoint.directory if checkpoint else start
    with catch_termination() as is_asked_to_stop:
        for step in range(first_step, rl.num_steps + 1):
            clock = time.perf_counter()
            rollout = collect_rollout(
                model, tokenizer, prompts, rl, step=step, cursor=state["cursor"], seed=config.seed
            )
            rollout_seconds = time.perf_counter() - clock
            rate = learning_rate(schedule, step, rl.num_steps)
            measured = (
                policy_update(model, updater, rollout.kept, rl, rate=rate, step=step) if rollout.kept else {}
            )
            state["cursor"] = rollout.cursor
            state.update(updater.counters)
            state["num_empty"] += not rollout.kept
            seconds = time.perf_counter() - clock
            metrics = rollout_metrics(rollout)
            if step % rl.log_every == 0 or step == rl.num_steps:
                record = {
                    "step": step,
                    **metrics,
                    **measured,
                    "learning_rate": rate,
                    "num_empty_steps": state["num_empty"],
                    "num_skipped": updater.num_skipped,
                }
                sampled = sum(len(r.token_ids) for group in rollout.drawn for r in group.responses)
                timing = {"rollout_tokens_per_second": sampled / rollout_seconds, "step_seconds": seconds}
                run.log(record, timing=timing)
            note = f"reward {metrics['reward_mean']:.2f}, {metrics['response_tokens_mean']:.0f} tokens a response"
            run.progress(step, rl.num_steps, unit="steps", rate=1 / seconds, note=note)
            is_stopped = is_asked_to_stop() and step < rl.num_steps
            if step % rl.save_every == 0 or rl.is_milestone(step) or is_stopped:
                last = saver.save(step, state)
            if is_stopped:
                raise RunStopped(step, rl.num_steps)
    run.finish({"checkpoint": str(last.relative_to(run.directory)), **state})
    return last


def _training_problems(config: RLRunConfig) -> Any:
    data_dir = Path(config.data_dir) if config.data_dir else None
    return load_task(
        config.rl.task,
        split="train",
        num_problems=config.rl.num_problems,
        seed=config.seed,
        data_dir=data_dir,
    )


def policy_update(
    model: Any, updater: Updater, groups: list[Group], config: RLConfig, *, rate: float, step: int
) -> dict[str, float]:
    """One GRPO update on whole groups: the clipped loss summed over response tokens, divided by their number in the batch.

    Returns:
        loss, gradient_norm, entropy_nats (mean over response tokens of the policy's entropy at the rollout's temperature), clip_share,
        max_ratio_deviation (largest |ratio - 1|), and sampler_gap_nats (largest difference between the sampler's log-probabilities
        and the trainer's).
    """
    advantages_R = group_advantages(rewards_of(groups)).flatten()
    rows = [(group.prompt_ids, response) for group in groups for response in group.responses]
    num_tokens = sum(len(response.token_ids) for _, response in rows)
    loss_sum = entropy_sum = 0.0
    num_clipped, max_deviation, max_gap = 0, 0.0, 0.0
    for indices in _micro_batches(rows, config.micro_batch_rows):
        batch = _pad([rows[i] for i in indices])
        log_probs_N, entropy_N = response_log_probs(model, batch, temperature=config.temperature)
        sampler_N = torch.cat([torch.tensor(rows[i][1].log_probs) for i in indices]).to(log_probs_N.device)
        old_N = log_probs_N.detach() if config.old_log_probs == "trainer" else sampler_N
        lengths = torch.tensor([len(rows[i][1].token_ids) for i in indices])
        advantages_N = advantages_R[indices].repeat_interleave(lengths).to(log_probs_N.device)
        result = clipped_policy_loss(
            log_probs_N, old_N, advantages_N, clip_low=config.clip_low, clip_high=config.clip_high
        )
        (result.loss_sum / num_tokens).backward()
        loss_sum += float(result.loss_sum.detach())
        entropy_sum += float(entropy_N.double().sum())
        num_clipped += result.num_clipped
        max_deviation = max(max_deviation, result.max_ratio_deviation)
        max_gap = max(max_gap, float((log_probs_N.detach() - sampler_N).abs().max()))
    loss = loss_sum / num_tokens
    return {
        "loss": loss,
        "gradient_norm": updater.apply(loss, rate, step=step),
        "entropy_nats": entropy_sum / num_tokens,
        "clip_share": num_clipped / num_tokens,
        "max_ratio_deviation": max_deviation,
        "sampler_gap_nats": max_gap,
    }


def _micro_batches(rows: list[Any], size: int) -> Iterator[list[int]]:
    """Rows of like length together, so that little is padded; the order is a function of the lengths alone."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1].token_ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@dataclass(frozen=True)
class PaddedResponses:
    """Prompt and response of each row, padded on the right, which causal attention never looks at.

    `targets_RT[r, t]` is the response token that follows position t, -100 elsewhere.
    """

    input_ids_RT: Tensor
    targets_RT: Tensor


def _pad(rows: list[Any]) -> PaddedResponses:
    longest = max(len(prompt) + len(response.token_ids) for prompt, response in rows) - 1
    inputs_RT = torch.zeros(len(rows), longest, dtype=torch.long)
    targets_RT = torch.full((len(rows), longest), -100)
    for row, (prompt, response) in enumerate(rows):
        ids = torch.tensor([*prompt, *response.token_ids])
        inputs_RT[row, : len(ids) - 1] = ids[:-1]
        targets_RT[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return PaddedResponses(inputs_RT, targets_RT)


def response_log_probs(model: Any, batch: PaddedResponses, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at `temperature` of every response token, row after row [N]; gradients flow to the former."""
    device = next(model.parameters()).device
    hidden_RTD = model.model(input_ids=batch.input_ids_RT.to(device), use_cache=False).last_hidden_state
    mask_RT = batch.targets_RT.to(device) != -100
    hidden_ND, targets_N = hidden_RTD[mask_RT] / temperature, batch.targets_RT.to(device)[mask_RT]
    nll_N, metrics = linear_shaped_cross_entropy(
        hidden_ND, head_weight(model), targets_N, CrossEntropy(), reduction="none", return_metrics=True
    )
    return -nll_N, metrics.entropy
