"""The language-model stage: pre-training and, from an earlier stage's weights, mid-training.

Differs: the paper's constants (16M tokens a step, 500B and 100B tokens) are the defaults of nothing here but the schedule; sizes come
from the config, and `configs/` holds them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rlprior.config import HOW, UsageError
from rlprior.data.packing import IGNORE_INDEX, Corpus, PackedBatch, PackedMixture
from rlprior.models.balancing import ExpertBalancer
from rlprior.models.causal_lm import build_model, load_model, load_tokenizer
from rlprior.models.presets import ModelConfig
from rlprior.objectives import CrossEntropy, Objective, SampledReward
from rlprior.runs.folder import Run
from rlprior.runs.signals import RunStopped, catch_termination
from rlprior.seeding import stream_seed, torch_generator
from rlprior.training.checkpoint import (
    CheckpointSaver,
    check_precision,
    find_checkpoint,
    restore_optimizer,
    tokens_seen,
)
from rlprior.training.engine import (
    EngineConfig,
    LanguageModelLoss,
    Precision,
    prepare_model,
    resolve_precision,
)
from rlprior.training.schedule import ScheduleConfig, learning_rate
from rlprior.training.spikes import SpikeCounter
from rlprior.training.throughput import model_flops_per_token, peak_flops_per_second
from rlprior.training.update import OptimizerConfig, Updater
from rlprior.world import ALONE, World

CODE = (
    "rlprior.training",
    "rlprior.objectives",
    "rlprior.models",
    "rlprior.data.corpus",
    "rlprior.data.packing",
    "rlprior.seeding",
)


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
        precision: dtype of the matrix products. Weights, moments and the sums of gradients stay float32. 'auto' is bfloat16 on GPUs
            and float32 on CPUs.
        micro_batch_tokens: tokens of one forward pass of a process; left out, all that it has. As with `engine`, speed, memory
            and rounding alone depend on it: an unfinished run may go on with another.
        engine: sharding, recomputation, compilation.
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
    precision: Precision = "auto"
    micro_batch_tokens: int | None = field(default=None, metadata=HOW)
    engine: EngineConfig = field(default_factory=EngineConfig, metadata=HOW)
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
    """Train, from the newest good checkpoint if there is one. Returns the folder of the last checkpoint.

    Raises:
        RunStopped: SIGTERM came; the step in progress has been finished and saved.
    """
    if run.result is not None:
        return run.directory / run.result["checkpoint"]
    training, world = config.training, run.world
    corpus = Corpus.open(Path(config.corpus))
    stream = "pretrain" if config.init_from is None else "midtrain"
    mixture = PackedMixture(
        corpus, training.mixture, training.sequence_length, stream_seed(config.seed, stream, "data")
    )
    rows = rows_of_rank(training, world)
    checkpoint = world.on_main(lambda: find_checkpoint(run.directory))
    model = _start_model(config, corpus, checkpoint.directory if checkpoint else None)
    precision = resolve_precision(training.precision, world)
    module = prepare_model(model, training.engine, precision, world)
    updater = Updater(module, training.optimizer)
    balancer = ExpertBalancer.attach(model, rate=config.model.balancing_rate)
    saver = CheckpointSaver(
        run.directory,
        model=model,
        tokenizer_directory=corpus.tokenizer_directory,
        optimizer=updater.optimizer,
        is_milestone=training.is_milestone,
        world=world,
        in_background=training.engine.writes_in_background(world.device_type),
    )
    spikes = SpikeCounter()
    first_step = 1
    tokens_before = tokens_seen(Path(config.init_from)) if config.init_from else 0
    if checkpoint:
        check_precision(checkpoint, precision)
        restore_optimizer(checkpoint.directory, model, updater.optimizer)
        updater.restore_counters(checkpoint.state)
        spikes.restore(checkpoint.state)
        first_step = checkpoint.step + 1
    run.resume_metrics(first_step - 1)
    rows_per_step = training.batch_tokens // training.sequence_length
    last = checkpoint.directory if checkpoint else run.directory
    log = _Log(run, training, first_step, model_flops_per_token(model, training.sequence_length))
    with catch_termination() as is_asked_to_stop:
        for step in range(first_step, training.num_steps + 1):
            rate = learning_rate(training.schedule, step, training.num_steps)
            measured = train_step(
                module,
                updater,
                mixture.batch((step - 1) * rows_per_step + rows.start, len(rows)),
                training,
                rate=rate,
                step=step,
                seed=config.seed,
                with_metrics=log.is_due(step),
                world=world,
            )
            spikes.add(measured["loss"])
            routed = _balance(balancer, updater)
            tokens = tokens_before + step * training.batch_tokens
            if log.is_due(step):
                log.write(
                    step,
                    {
                        "tokens": tokens,
                        "tokens_by_source": _tokens_by_source(mixture, step * rows_per_step),
                        **measured,
                        **routed,
                        **(_relative_load(balancer) if routed else {}),
                        "learning_rate": rate,
                        "num_skipped": updater.num_skipped,
                        "num_spikes": spikes.num_spikes,
                    },
                )
            asked = world.sum({"stop": float(is_asked_to_stop()), "writing": float(saver.is_writing)})
            if not asked["writing"]:
                saver.finish()
            is_stopped = asked["stop"] > 0 and step < training.num_steps
            if step % training.save_every == 0 or training.is_milestone(step) or is_stopped:
                counters = {**updater.counters, **spikes.state}
                last = saver.save(step, {"tokens": tokens, "precision": precision, **counters})
            if is_stopped:
                saver.finish()
                raise RunStopped(step, training.num_steps)
        saver.finish()
        run.finish({"checkpoint": str(last.relative_to(run.directory)), "num_skipped": updater.num_skipped})
    return last


def _balance(balancer: ExpertBalancer, updater: Updater) -> dict[str, float]:
    """Move the biases after a step that counts; what there is to log of the routing, which is nothing for a dense model."""
    if updater.num_skipped_in_a_row:
        balancer.reset()
        return {}
    return balancer.update()


def _relative_load(balancer: ExpertBalancer) -> dict[str, list[list[float]]]:
    """Load of every expert in the last step."""
    return {"relative_load": [[round(load, 3) for load in layer] for layer in balancer.relative_load]}


def _tokens_by_source(mixture: PackedMixture, num_rows: int) -> dict[str, int]:
    """Tokens of each source in the first rows."""
    tokens = mixture.rows_before(num_rows) * mixture.sequence_length
    return dict(zip(mixture.names, tokens.tolist(), strict=True))


class _Log:
    """Metrics of every `log_every`-th step and of the last, with the speed since the one before."""

    def __init__(
        self, run: Run, training: TrainingConfig, first_step: int, flops_per_token: float | None
    ) -> None:
        self.run, self.training = run, training
        peak = peak_flops_per_second(run.world.device_name)
        self.peak_tokens_per_second = (
            run.world.size * peak / flops_per_token if peak and flops_per_token else None
        )
        self.clock, self.last_step = time.perf_counter(), first_step - 1

    def is_due(self, step: int) -> bool:
        return step % self.training.log_every == 0 or step == self.training.num_steps

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        steps_per_second = (step - self.last_step) / (now - self.clock)
        self.clock, self.last_step = now, step
        speed = steps_per_second * self.training.batch_tokens
        timing = {"tokens_per_second": speed}
        if self.peak_tokens_per_second:
            timing["mfu"] = speed / self.peak_tokens_per_second
        self.run.log({"step": step, **record}, timing=timing)
        note = f"loss {record['cross_entropy_nats']:.3f}, {speed:,.0f} tokens/s"
        self.run.progress(step, self.training.num_steps, unit="steps", rate=steps_per_second, note=note)


def rows_of_rank(training: TrainingConfig, world: World) -> range:
    """Which rows of each batch this process takes: every process as many, in the order of their ranks."""
    num_rows = training.batch_tokens // training.sequence_length
    if world.size > 1 and isinstance(training.objective, SampledReward):
        raise UsageError("the sampled_reward objective runs in one process; start it without torchrun")
    if num_rows % world.size:
        raise UsageError(
            f"a batch of {num_rows} rows (batch_tokens / sequence_length) cannot be shared out evenly among {world.size} processes; "
            "change batch_tokens or their number"
        )
    share = num_rows // world.size
    return range(world.rank * share, (world.rank + 1) * share)


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
    module: LanguageModelLoss,
    updater: Updater,
    batch: PackedBatch,
    training: TrainingConfig,
    *,
    rate: float,
    step: int,
    seed: int,
    with_metrics: bool,
    world: World = ALONE,
) -> dict[str, float]:
    """One update: gradients of summed losses, divided by the number of targets of the whole batch, whatever the micro-batches and
    processes.

    Args:
        batch: this process's rows.

    Returns:
        loss (the objective's surrogate value, not comparable between objectives), gradient_norm, and where `with_metrics` plain
        cross_entropy_nats, entropy_nats, head_mass and target_rank, each a mean over the targets of all processes.
    """
    counted = {"num_targets": float((batch.targets != IGNORE_INDEX).sum())}
    num_targets = max(1.0, world.sum(counted)["num_targets"])
    # only the sampled estimator draws; the stream depends on the step alone, so that a resumed run draws the same
    generator = (
        torch_generator(seed, "objective", step) if isinstance(training.objective, SampledReward) else None
    )
    totals: dict[str, Tensor] = {}
    for rows in _micro_batches(batch, training):
        loss, metrics = module(
            rows.to(world.device), training.objective, with_metrics=with_metrics, generator=generator
        )
        # sharding averages gradients over the processes; the product with their number makes it the sum
        (loss * (world.size / num_targets)).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, 0.0) + value.double()
    sums = world.sum({name: float(total) for name, total in totals.items()})
    means = {name: total / num_targets for name, total in sums.items()}
    return {**means, "gradient_norm": updater.apply(means["loss"], rate, step=step)}


def _micro_batches(batch: PackedBatch, training: TrainingConfig) -> Iterator[PackedBatch]:
    num_rows = len(batch.input_ids)
    size = (training.micro_batch_tokens or training.batch_tokens) // training.sequence_length
    for start in range(0, num_rows, size):
        yield batch.rows(slice(start, min(start + size, num_rows)))
