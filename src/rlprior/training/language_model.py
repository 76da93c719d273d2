"""The language-model stage: pre-training and, from an earlier stage's weights, mid-training.

Differs: the paper's constants (16M tokens a step, 500B and 100B tokens) are the defaults of nothing here but the schedule; sizes come
from the config, and `configs/` holds them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlprior.config import UsageError
from rlprior.data.packing import IGNORE_INDEX, Corpus, PackedBatch, PackedMixture, attention_mask
from rlprior.models.causal_lm import (
    build_model,
    head_weight,
    load_model,
    load_tokenizer,
    packed_hidden_states,
)
from rlprior.models.presets import ModelConfig
from rlprior.objectives import CrossEntropy, Objective, SampledReward, linear_shaped_cross_entropy
from rlprior.runs import Run
from rlprior.seeding import stream_seed, torch_generator
from rlprior.training.checkpoint import (
    last_good_checkpoint,
    remove_leftovers,
    restore_optimizer,
    save_checkpoint,
    tokens_seen,
)
from rlprior.training.schedule import ScheduleConfig, learning_rate
from rlprior.training.update import OptimizerConfig, Updater

CODE = ("rlprior.training", "rlprior.objectives", "rlprior.models", "rlprior.data.packing", "rlprior.seeding")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What one language-model stage does.

    Args:
        mixture: weight of each source of the corpus; weights are normalised to 1.
        num_steps: optimizer updates.
        batch_tokens: tokens of one update; a multiple of `sequence_length`.
        sequence_length: positions of a row (4096 in the paper's pre-training, 16384 in mid-training).
        objective: the next-token objective; `{name = "cross_entropy"}` and so on.
        rope_theta: new base of the rotary embedding (1e6 in mid-training); left out, the model keeps its own.
        micro_batch_tokens: tokens of one forward pass; left out, the whole batch. Changes memory and rounding only.
        schedule, optimizer: learning rate and AdamW.
        log_every: steps between metrics; those of the steps between are not kept.
        eval_every: steps between checkpoints that are kept and evaluated; 0 keeps the last one alone.
        save_every: steps between checkpoints to resume from.
    """

    mixture: dict[str, float]
    num_steps: int
    batch_tokens: int
    sequence_length: int = 4096
    objective: Objective = field(default_factory=CrossEntropy)
    rope_theta: float | None = None
    micro_batch_tokens: int | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_tokens", "sequence_length", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be 0 or more, not {self.eval_every}")
        for name, tokens in (
            ("batch_tokens", self.batch_tokens),
            ("micro_batch_tokens", self.micro_batch_tokens),
        ):
            if tokens is not None and (tokens < 1 or tokens % self.sequence_length):
                raise ValueError(
                    f"{name} = {tokens} must be a multiple of sequence_length = {self.sequence_length}"
                )
        if not self.mixture or any(not weight >= 0 for weight in self.mixture.values()):
            raise ValueError("mixture needs at least one source, and weights of 0 or more")

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole stage."""
        return self.num_steps * self.batch_tokens

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of `step` is kept and evaluated."""
        return step == self.num_steps or (self.eval_every > 0 and step % self.eval_every == 0)


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A run of the language-model stage.

    Args:
        training: what it does.
        corpus: folder that the data stage prepared.
        seed: of initialisation and data order, independent of the objective: arms of one seed are paired.
        model: the model to build, where `init_from` is left out.
        init_from: Hugging Face folder to go on from (mid-training, or any causal model with the corpus's tokenizer).
    """

    training: TrainingConfig
    corpus: str
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    init_from: str | None = None


def run(config: LanguageModelConfig, run: Run) -> Path:
    """Train, from the newest good checkpoint if there is one. Returns the folder of the last checkpoint."""
    if run.result is not None:
        return run.directory / run.result["checkpoint"]
    training = config.training
    corpus = Corpus.open(Path(config.corpus))
    stream = "pretrain" if config.init_from is None else "midtrain"
    mixture = PackedMixture(
        corpus, training.mixture, training.sequence_length, stream_seed(config.seed, stream, "data")
    )
    remove_leftovers(run.directory)
    checkpoint = last_good_checkpoint(run.directory)
    model = _start_model(config, corpus, checkpoint.directory if checkpoint else None)
    updater = Updater(model, training.optimizer)
    first_step = 1
    tokens_before = tokens_seen(Path(config.init_from)) if config.init_from else 0
    if checkpoint:
        restore_optimizer(checkpoint.directory, model, updater.optimizer)
        updater.restore_counters(checkpoint.state)
        first_step = checkpoint.step + 1
    run.resume_metrics(first_step - 1)
    rows_per_step = training.batch_tokens // training.sequence_length
    last = checkpoint.directory if checkpoint else run.directory
    clock, steps_timed = time.perf_counter(), 0
    for step in range(first_step, training.num_steps + 1):
        batch = mixture.batch((step - 1) * rows_per_step, rows_per_step)
        is_logged = step % training.log_every == 0 or step == training.num_steps
        rate = learning_rate(training.schedule, step, training.num_steps)
        measured = train_step(
            model, updater, batch, training, rate=rate, step=step, seed=config.seed, with_metrics=is_logged
        )
        tokens = tokens_before + step * training.batch_tokens
        steps_timed += 1
        if is_logged:
            elapsed = time.perf_counter() - clock
            speed = steps_timed * training.batch_tokens / elapsed
            clock, steps_timed = time.perf_counter(), 0
            record = {
                "step": step,
                "tokens": tokens,
                **measured,
                "learning_rate": rate,
                "num_skipped": updater.num_skipped,
            }
            run.log(record, timing={"tokens_per_second": speed})
            note = f"loss {measured['cross_entropy_nats']:.3f}, {speed:,.0f} tokens/s"
            run.progress(
                step, training.num_steps, unit="steps", rate=speed / training.batch_tokens, note=note
            )
        if step % training.save_every == 0 or training.is_milestone(step):
            state = {"tokens": tokens, **updater.counters}
            last = save_checkpoint(
                run.directory,
                step=step,
                model=model,
                tokenizer_directory=corpus.tokenizer_directory,
                optimizer=updater.optimizer,
                state=state,
                is_milestone=training.is_milestone,
            )
    run.finish({"checkpoint": str(last.relative_to(run.directory)), "num_skipped": updater.num_skipped})
    return last


def _start_model(config: LanguageModelConfig, corpus: Corpus, checkpoint: Path | None) -> Any:
    """The model at the run's first step or at its checkpoint, checked against the corpus."""
    training = config.training
    tokenizer = load_tokenizer(corpus.tokenizer_directory)
    if checkpoint is None and config.init_from is None:
        model = build_model(config.model, tokenizer, max_positions=training.sequence_length, seed=config.seed)
    else:
        path = checkpoint or Path(str(config.init_from))
        model = load_model(path, rope_theta=training.rope_theta, max_positions=training.sequence_length)
        _check_vocabulary(path, model.config.vocab_size, tokenizer)
    return model.train()


def _check_vocabulary(path: Path, vocab_size: int, tokenizer: Any) -> None:
    """UsageError unless the model's ids mean what the corpus's tokenizer means by them."""
    advice = "prepare the corpus with the model's tokenizer (data.tokenizer.path)"
    if vocab_size < len(tokenizer):
        raise UsageError(
            f"{path}: its vocabulary of {vocab_size} is smaller than the corpus's {len(tokenizer)}; {advice}"
        )
    if (path / "tokenizer.json").is_file() and load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"{path}: its tokenizer is not the corpus's; {advice}")


def train_step(
    model: Any,
    updater: Updater,
    batch: PackedBatch,
    training: TrainingConfig,
    *,
    rate: float,
    step: int,
    seed: int,
    with_metrics: bool,
) -> dict[str, float]:
    """One update: gradients of summed losses, divided by the batch's number of targets, whatever the micro-batches.

    Returns:
        loss (the objective's surrogate value, not comparable between objectives), gradient_norm, and where `with_metrics` plain
        cross_entropy_nats, entropy_nats, head_mass and target_rank, each a mean over targets.
    """
    num_targets = max(1, int((batch.targets != IGNORE_INDEX).sum()))
    # only the sampled estimator draws; the stream depends on the step alone, so that a resumed run draws the same
    generator = (
        torch_generator(seed, "objective", step) if isinstance(training.objective, SampledReward) else None
    )
    totals: dict[str, float] = {}
    for rows in _micro_batches(batch, training):
        hidden = packed_hidden_states(
            model, batch.input_ids[rows], batch.position_ids[rows], attention_mask(batch.document_ids[rows])
        )
        loss, metrics = stage_loss(
            hidden, head_weight(model), batch.targets[rows], training.objective, with_metrics, generator
        )
        (loss / num_targets).backward()
        _add(totals, {"loss": loss.detach(), **metrics})
    means = {name: total / num_targets for name, total in totals.items()}
    return {**means, "gradient_norm": updater.apply(means["loss"], rate, step=step)}


def _micro_batches(batch: PackedBatch, training: TrainingConfig) -> Iterator[slice]:
    num_rows = len(batch.input_ids)
    size = (training.micro_batch_tokens or training.batch_tokens) // training.sequence_length
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def stage_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    with_metrics: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective and, where asked for, summed metrics over the targets that are not ignored."""
    if not with_metrics:
        loss = linear_shaped_cross_entropy(
            hidden, weight, targets, objective, reduction="sum", generator=generator
        )
        return loss, {}
    loss, metrics = linear_shaped_cross_entropy(
        hidden, weight, targets, objective, reduction="sum", generator=generator, return_metrics=True
    )
    sums = {
        "cross_entropy_nats": metrics.cross_entropy,
        "entropy_nats": metrics.entropy,
        "head_mass": metrics.head_mass,
        "target_rank": metrics.target_rank,
    }
    return loss, {name: torch.nansum(value.double()) for name, value in sums.items()}


def _add(totals: dict[str, float], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + float(value)
