"""TRL's trainers under this project's conventions: checkpoints, logs, stopping and going on are those of the other stages.

TRL computes the loss and its gradient; the order of the examples, the learning rate and all randomness are functions of (seed, step), so that
weights, moments and a step are all that there is to save. A trainer that goes on is a new one, for the steps that are left.

Importing this module needs TRL.
"""

from __future__ import annotations

import contextlib
import importlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback

from rlprior.config import RunError
from rlprior.models.causal_lm import load_model, load_tokenizer
from rlprior.models.onednn import is_onednn_faster, multiply_with_onednn
from rlprior.posttraining.config import UpdatesConfig
from rlprior.runs.folder import Run
from rlprior.runs.signals import RunStopped, catch_termination
from rlprior.seeding import shuffled_places, stream_seed
from rlprior.training.checkpoint import (
    CheckpointSaver,
    checkpoint_directory,
    find_checkpoint,
    restore_optimizer,
    tokens_seen,
)
from rlprior.training.schedule import learning_rate
from rlprior.training.update import MAX_SKIPPED_IN_A_ROW, build_optimizer

trl: Any = importlib.import_module("trl")

NAMES = {
    "loss": "loss",
    "grad_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "entropy": "entropy_nats",
    "mean_token_accuracy": "token_accuracy",
    **{
        name: name
        for name in (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        )
    },
}
"""TRL's name of a metric -> what it is logged as; the others are not logged."""


class SFTTrainer(trl.SFTTrainer):
    """TRL's, without its report to Hugging Face."""

    def _send_telemetry(self) -> None:
        pass


class DPOTrainer(trl.DPOTrainer):
    """TRL's, without its report to Hugging Face, on pairs that are tokens already: as text they might be split up otherwise than the
    sampler had drawn them.
    """

    def _send_telemetry(self) -> None:
        pass

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


MakeTrainer = Callable[..., Any]
"""`make(model, options, **arguments)`: a TRL trainer; `options` belong to its config, `arguments` to itself."""


def train(
    make: MakeTrainer,
    examples: Sequence[Mapping[str, list[int]]],
    config: UpdatesConfig,
    run: Run,
    *,
    init_from: Path,
    max_positions: int,
    seed: int,
    result: Mapping[str, Any],
) -> Path:
    """Train, from the newest good checkpoint if there is one, and finish the run. Returns the folder of the last checkpoint.

    Args:
        make: makes the trainer around a model, its options and its examples.
        examples: token ids by column.
        config: the updates.
        run: where everything is written.
        init_from: Hugging Face folder to start from.
        max_positions: of the longest example.
        seed: of the order of the examples, and of dropout where a model has any.
        result: what `result.json` holds besides.

    Raises:
        RunStopped: SIGTERM came; the step in progress has been finished and saved.
    """
    num_steps = config.count_steps(len(examples))
    checkpoint = find_checkpoint(run.directory)
    model = load_for_training(checkpoint.directory if checkpoint else init_from, max_positions, run)
    optimizer = build_optimizer(model, config.optimizer)
    saver = CheckpointSaver(
        run.directory,
        model=model,
        tokenizer_directory=init_from,
        optimizer=optimizer,
        is_milestone=lambda step: is_milestone(config, step, num_steps),
    )
    state: dict[str, Any] = {"tokens": tokens_seen(init_from), "num_skipped": 0, "num_skipped_in_a_row": 0}
    num_done = 0
    if checkpoint:
        restore_optimizer(checkpoint.directory, model, optimizer)
        state, num_done = dict(checkpoint.state), checkpoint.step
    run.resume_metrics(num_done)
    with catch_termination() as is_asked_to_stop, _without_trl_warnings():
        conductor = Conductor(run, config, saver, state, num_done, num_steps, seed, is_asked_to_stop)
        if num_done < num_steps:
            places = range(num_done * config.batch_size, num_steps * config.batch_size)
            order = shuffled_places(len(examples), places, seed, "examples")
            trainer = make(
                model,
                trainer_options(config, run, num_steps - num_done),
                train_dataset=datasets.Dataset.from_list([dict(one) for one in examples]).select(order),
                processing_class=load_tokenizer(init_from),
                callbacks=[conductor],
                optimizers=(optimizer, _scheduler(optimizer, config, num_done, num_steps)),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    last = checkpoint_directory(run.directory, num_steps)
    run.finish({"checkpoint": str(last.relative_to(run.directory)), **result, **state})
    return last


@contextlib.contextmanager
def _without_trl_warnings() -> Iterator[None]:
    """TRL 1.16 calls what transformers 5.23 has renamed; whoever trains can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is deprecated and will be removed in v6", FutureWarning)
        yield


def load_for_training(path: Path, max_positions: int, run: Run) -> Any:
    """The model of a folder on the run's device."""
    model: Any = load_model(path, max_positions=max_positions)
    if run.world.device_type == "cpu" and is_onednn_faster():
        multiply_with_onednn(model)
    return model.to(run.world.device).train()


def is_milestone(config: UpdatesConfig, step: int, num_steps: int) -> bool:
    """Whether the checkpoint of `step` is kept."""
    return step == num_steps or (config.eval_every > 0 and step % config.eval_every == 0)


def trainer_options(config: UpdatesConfig, run: Run, num_steps: int) -> dict[str, Any]:
    """Options of every trainer's config: nothing is written, printed, reported or shuffled by it."""
    return {
        "output_dir": str(run.directory),
        "per_device_train_batch_size": config.rows_per_pass,
        "gradient_accumulation_steps": config.batch_size // config.rows_per_pass,
        "max_steps": num_steps,
        "max_grad_norm": config.optimizer.max_gradient_norm,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "push_to_hub": False,
        "use_cpu": run.world.device_type == "cpu",
        "bf16": config.precision == "bfloat16",
        "gradient_checkpointing": None,  # which is "off" without the warning that newer transformers have for False
        "dataloader_pin_memory": run.world.device_type != "cpu",
    }


def _scheduler(
    optimizer: torch.optim.Optimizer, config: UpdatesConfig, num_done: int, num_steps: int
) -> LambdaLR:
    """The rate of step `num_done + 1`, and of the next one after each update."""
    schedule = config.schedule(num_steps)
    for group in optimizer.param_groups:
        group["lr"] = 1.0  # which LambdaLR multiplies
    return LambdaLR(optimizer, lambda done: learning_rate(schedule, num_done + done + 1, num_steps + 1))


@dataclass
class Conductor(TrainerCallback):
    """What happens between the updates of a trainer: metrics, checkpoints, SIGTERM, and updates that are not finite.

    Args:
        run, config, saver: of the stage.
        state: counters, changed in place and saved with each checkpoint.
        num_done: updates made before this trainer, which counts from 0.
        num_steps: updates of the whole stage.
        seed: of the stage.
        is_asked_to_stop: whether SIGTERM has come.
    """

    run: Run
    config: UpdatesConfig
    saver: CheckpointSaver
    state: dict[str, Any]
    num_done: int
    num_steps: int
    seed: int
    is_asked_to_stop: Callable[[], bool]
    clock: float = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Dropout, where a model has any, is a function of the step."""
        torch.manual_seed(stream_seed(self.seed, "dropout", self.num_done + state.global_step + 1))
        self.clock = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """An update whose gradient is not finite is skipped and counted; the third in a row ends the run."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.state["num_skipped_in_a_row"] = 0
            return
        self.state["num_skipped"] += 1
        self.state["num_skipped_in_a_row"] += 1
        if self.state["num_skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            step = self.num_done + state.global_step + 1
            raise RunError(
                f"step {step}: the gradient was not finite {MAX_SKIPPED_IN_A_ROW} times in a row; lower the learning rate"
            )
        model.zero_grad(set_to_none=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """After each update; the trainer's summary at its end has no `loss`."""
        if "loss" not in logs:
            return
        step, seconds = self.num_done + state.global_step, time.perf_counter() - self.clock
        measured = {NAMES[name]: float(value) for name, value in logs.items() if name in NAMES}
        if step % self.config.log_every == 0 or step == self.num_steps:
            record = {"step": step, **measured, "num_skipped": self.state["num_skipped"]}
            self.run.log(record, timing={"step_seconds": seconds})
        note = f"loss {measured['loss']:.4f}"
        if "rewards/margins" in measured:
            note += f", margin {measured['rewards/margins']:.4f}"
        self.run.progress(step, self.num_steps, unit="steps", rate=1 / seconds, note=note)
        is_stopped = self.is_asked_to_stop() and step < self.num_steps
        is_kept = is_milestone(self.config, step, self.num_steps)
        if step % self.config.save_every == 0 or is_kept or is_stopped:
            self.saver.save(step, self.state)
        if is_stopped:
            raise RunStopped(step, self.num_steps)
