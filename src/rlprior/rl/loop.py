"""Reinforcement learning with verifiable rewards: roll out, keep the groups that teach, update once, repeat."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprior.models.causal_lm import load_model, load_tokenizer, require_model_folder
from rlprior.rl.config import RLConfig
from rlprior.rl.rollout import PromptStream, Rollout, collect_rollout, rollout_metrics
from rlprior.rl.update import PolicyLogProbs, policy_update
from rlprior.runs.folder import Run
from rlprior.runs.signals import RunStopped, catch_termination
from rlprior.sampling.engines import open_engine
from rlprior.tasks.config import data_folder, load_task
from rlprior.tasks.verifier import open_verifier
from rlprior.training.checkpoint import (
    CheckpointSaver,
    check_precision,
    find_checkpoint,
    restore_optimizer,
    tokens_seen,
)
from rlprior.training.engine import prepare_model, resolve_precision
from rlprior.training.schedule import ScheduleConfig, learning_rate
from rlprior.training.update import Updater

CODE = (
    "rlprior.rl.config",
    "rlprior.sampling",
    "rlprior.rl.grpo",
    "rlprior.rl.loop",
    "rlprior.rl.rollout",
    "rlprior.rl.update",
    "rlprior.data",
    "rlprior.tasks",
    "rlprior.objectives",
    "rlprior.models",
    "rlprior.training.checkpoint",
    "rlprior.training.engine",
    "rlprior.training.schedule",
    "rlprior.training.update",
    "rlprior.seeding",
)


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

    Every process of `run.world` calls this; the steps do not depend on how many there are, rounding apart.

    Raises:
        RunStopped: SIGTERM came; the step in progress has been finished and saved.
    """
    if run.result is not None:
        return run.directory / run.result["checkpoint"]
    rl, start, world = config.rl, Path(config.init_from), run.world
    checkpoint = world.on_main(lambda: find_checkpoint(run.directory))
    require_model_folder(start)
    tokenizer = load_tokenizer(start)
    prompts = PromptStream(_training_problems(config), tokenizer, config.seed)
    max_length = prompts.max_length + max(phase.max_new_tokens for phase in rl.length_schedule)
    policy = checkpoint.directory if checkpoint else start
    model: Any = load_model(policy, max_positions=max_length).train()
    precision = resolve_precision(rl.precision, world)
    engine = open_engine(rl.rollout, model, policy, max_length=max_length, precision=precision, world=world)
    module = prepare_model(model, rl.engine, precision, world, PolicyLogProbs)
    updater = Updater(module, rl.optimizer)
    saver = CheckpointSaver(
        run.directory,
        model=model,
        tokenizer_directory=start,
        optimizer=updater.optimizer,
        is_milestone=rl.is_milestone,
        world=world,
        in_background=rl.engine.writes_in_background(world.device_type),
    )
    state: dict[str, Any] = {
        "cursor": 0,
        "tokens": tokens_seen(start),
        "num_empty": 0,
        "precision": precision,
        **updater.counters,
    }
    first_step = 1
    if checkpoint:
        check_precision(checkpoint, precision)
        restore_optimizer(checkpoint.directory, model, updater.optimizer)
        state, first_step = dict(checkpoint.state), checkpoint.step + 1
        updater.restore_counters(state)
    run.resume_metrics(first_step - 1)
    schedule = ScheduleConfig(
        peak_learning_rate=rl.learning_rate, final_learning_rate=0.0, warmup_steps=rl.warmup_steps
    )
    last = policy
    with (
        catch_termination() as is_asked_to_stop,
        open_verifier(rl.task, data_folder(config.data_dir)) as verifier,
    ):
        for step in range(first_step, rl.num_steps + 1):
            clock = time.perf_counter()
            rollout = collect_rollout(
                engine,
                tokenizer,
                prompts,
                rl,
                step=step,
                cursor=state["cursor"],
                seed=config.seed,
                verifier=verifier,
                world=world,
            )
            rollout_seconds = time.perf_counter() - clock
            rate = learning_rate(schedule, step, rl.num_steps)
            measured = {}
            if rollout.kept:
                measured = policy_update(module, updater, rollout.kept, rl, rate=rate, step=step, world=world)
            if measured:
                engine.load(model)
            seconds = time.perf_counter() - clock
            state["cursor"] = rollout.cursor
            state.update(updater.counters)
            state["num_empty"] += not measured
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
                run.log(record, timing=_speed(rollout, rollout_seconds, seconds))
            note = f"reward {metrics['reward_mean']:.2f}, {metrics['response_tokens_mean']:.0f} tokens a response"
            run.progress(step, rl.num_steps, unit="steps", rate=1 / seconds, note=note)
            asked = world.sum({"stop": float(is_asked_to_stop()), "writing": float(saver.is_writing)})
            if not asked["writing"]:
                saver.finish()
            is_stopped = asked["stop"] > 0 and step < rl.num_steps
            if step % rl.save_every == 0 or rl.is_milestone(step) or is_stopped:
                last = saver.save(step, state)
            if is_stopped:
                saver.finish()
                raise RunStopped(step, rl.num_steps)
        saver.finish()
        run.finish({"checkpoint": str(last.relative_to(run.directory)), **state})
    return last


def _speed(rollout: Rollout, rollout_seconds: float, seconds: float) -> dict[str, float]:
    """What never repeats: tokens a second of both halves of a step, and its seconds."""
    drawn, kept = (
        sum(len(response.token_ids) for group in groups for response in group.responses)
        for groups in (rollout.drawn, rollout.kept)
    )
    speed = {"rollout_tokens_per_second": drawn / rollout_seconds, "step_seconds": seconds}
    if kept:
        speed["update_tokens_per_second"] = kept / (seconds - rollout_seconds)
    return speed


def _training_problems(config: RLRunConfig) -> Any:
    return load_task(
        config.rl.task,
        split="train",
        num_problems=config.rl.num_problems,
        seed=config.seed,
        data_dir=data_folder(config.data_dir),
    )
