"""`rlprior plan`: the stages of a file, or of a model by name, on devices that nobody has rented yet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlprior.config import UsageError, apply_overrides, decode, read_toml
from rlprior.data.config import DataConfig
from rlprior.models.presets import ModelConfig, Shape, num_active_parameters
from rlprior.study.config import StudyConfig, TrainFile
from rlprior.study.estimate import format_seconds
from rlprior.training.language_model import TrainingConfig
from rlprior.training.memory import (
    KINDS,
    MOMENTS,
    TrainingJob,
    checkpoint_bytes,
    offloaded_cpu_bytes,
    start_up_cpu_bytes,
)
from rlprior.training.planning import (
    DEVICES_PER_NODE,
    GIGABYTE,
    RESERVED_FRACTION,
    StagePlan,
)
from rlprior.training.throughput import PEAKS

DEVICES = (*PEAKS, "cpu")
Place = Mapping[str, Any]
"""num_devices and device_type of `TrainingJob`."""


def place(device: str, num_devices: int) -> Place:
    """Where the stages run.

    Raises:
        UsageError: no device, or one of an unknown kind.
    """
    if device not in DEVICES:
        raise UsageError(f"--device {device} is unknown; known: {', '.join(DEVICES)}")
    if num_devices < 1:
        raise UsageError(f"--devices {num_devices} must be at least 1")
    return {"num_devices": num_devices, "device_type": "cpu" if device == "cpu" else "cuda"}


def jobs_of_preset(
    preset: str,
    where: Place,
    *,
    sequence_length: int,
    batch_tokens: int,
    num_tokens: float,
    vocab_size: int,
    overrides: Sequence[str] = (),
) -> dict[str, TrainingJob]:
    """One stage of a preset, in micro-batches of one row; `overrides` as for a file with the tables `model` and `training`."""
    if min(sequence_length, batch_tokens, vocab_size) < 1 or not 1 <= num_tokens < math.inf:
        raise UsageError(
            "--sequence-length, --batch-tokens, --tokens and --vocab-size must be at least 1, and finite"
        )
    tables = {
        "model": {"preset": preset},
        "training": {
            "mixture": {"any": 1},
            "num_steps": max(1, round(num_tokens / batch_tokens)),
            "batch_tokens": batch_tokens,
            "sequence_length": sequence_length,
            "micro_batch_tokens": sequence_length,
        },
    }
    tables = apply_overrides(tables, overrides)
    unknown = [name for name in tables if name not in ("model", "training")]
    if unknown:
        raise UsageError(
            f"--{unknown[0]}: with --model there are the settings --model.KEY and --training.KEY"
        )
    source = f"--model {preset}"
    shape = decode(ModelConfig, tables["model"], source=source, where="model").shape
    training = decode(TrainingConfig, tables["training"], source=source, where="training")
    return {preset: TrainingJob(shape=shape, vocab_size=vocab_size, training=training, **where)}


def jobs_of_file(
    path: Path, where: Place, overrides: Sequence[str] = (), vocab_size: int | None = None
) -> dict[str, TrainingJob]:
    """The language-model stages of a study's file, or the one of a file of `rlprior train`, by name.

    Without `vocab_size` the tokenizer that the file names has to be there.
    """
    tables = apply_overrides(read_toml(path), overrides)
    if "training" not in tables and ("pretrain" in tables or "arms" in tables):
        study = decode(StudyConfig, tables, source=str(path))
        stages = {"pretrain": study.pretrain, "midtrain": study.midtrain}
        shape = study.model.shape
        vocab_size = vocab_size or _vocab_size(study.data, study.data_dir)
    else:
        file = decode(TrainFile, tables, source=str(path))
        stages = {"midtrain" if file.init_from else "pretrain": file.training}
        if file.init_from:
            shape, vocab_size = _read_shape(Path(file.init_from))
        else:
            shape = file.model.shape
            vocab_size = vocab_size or _vocab_size(file.data, file.data_dir)
    return {
        name: TrainingJob(shape=shape, vocab_size=vocab_size, training=training, **where)
        for name, training in stages.items()
    }


def _vocab_size(data: DataConfig, data_dir: str | None) -> int:
    """Of the tokenizer that the data stage trains, as many entries as it may have, or of the one that it is given."""
    if data.tokenizer.path is None:
        return data.tokenizer.vocab_size
    from rlprior.models.causal_lm import load_tokenizer

    folder = Path(data.data_dir or data_dir or ".") / data.tokenizer.path
    try:
        return len(load_tokenizer(folder))
    except UsageError as error:
        raise UsageError(
            f"{error}; before it is there, say how many entries it has: --vocab-size N"
        ) from None


def _read_shape(folder: Path) -> tuple[Shape, int]:
    """Shape and vocabulary of a Hugging Face folder of one of our two kinds of model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(
            f"{folder}: not a Hugging Face model folder (config.json is missing or damaged)"
        ) from None
    kind = config.get("model_type")
    if kind not in ("qwen3", "dots1"):
        raise UsageError(f"{folder}: its model_type is {kind!r}; planned are 'qwen3' and 'dots1' alone")
    is_mixture = kind == "dots1"
    shape = Shape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["moe_intermediate_size" if is_mixture else "intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        num_experts=config["n_routed_experts"] if is_mixture else 0,
        num_experts_per_token=config["num_experts_per_tok"] if is_mixture else 0,
        tied_embeddings=config["tie_word_embeddings"],
    )
    return shape, config["vocab_size"]


# What a plan looks like


def describe(name: str, plan: StagePlan) -> str:
    """A plan for a person."""
    return "\n".join([*_headline(name, plan), "", *_memory_table(plan), "", *_verdict(plan), *_cost(plan)])


def _headline(name: str, plan: StagePlan) -> list[str]:
    job, engine = plan.job, plan.job.training.engine
    copies = job.num_devices // job.shard_size
    kind = "device" if job.num_devices == 1 else "devices"
    sharding = f", {copies} copies of the model on {job.shard_size} each" if copies > 1 else ""
    return [
        f"{name}: {_count(job.num_parameters)} parameters, {_count(num_active_parameters(job.shape))} active without embeddings",
        f"{job.num_devices} {kind} ({plan.device}, {plan.memory_gb:g} GB){sharding}; {job.precision}; "
        f"activation_checkpointing {engine.activation_checkpointing!r}",
        f"a step: {job.training.batch_tokens:,} tokens in rows of {job.training.sequence_length:,}; a device takes "
        f"{job.num_micro_batches} micro-batches of {job.micro_batch_tokens:,} tokens",
    ]


def _memory_table(plan: StagePlan) -> list[str]:
    """GB by kind and moment, the largest moment marked."""
    width = max(map(len, KINDS)) + 2
    lines = [
        f"{'GB of a device':<{width}}{'forward, with':>14}   --- backward, through the ---",
        " " * width + "".join(f"{moment:>14}" for moment in MOMENTS),
    ]
    for kind in KINDS:
        sizes = [plan.moments[moment][kind] for moment in MOMENTS]
        if any(sizes):
            lines.append(f"  {kind:<{width - 2}}" + "".join(f"{_gigabytes(size):>14}" for size in sizes))
    totals = [sum(plan.moments[moment].values()) for moment in MOMENTS]
    marks = [
        f"{'> ' if moment == plan.peak_moment else ''}{_gigabytes(total)}"
        for moment, total in zip(MOMENTS, totals, strict=True)
    ]
    return [*lines, f"{'together':<{width}}" + "".join(f"{mark:>14}" for mark in marks)]


def _verdict(plan: StagePlan) -> list[str]:
    usable = plan.memory_gb * (1 - RESERVED_FRACTION)
    what = f"{_gigabytes(plan.peak_bytes)} GB at most, of {usable:g} GB ({RESERVED_FRACTION:.0%} kept free for what is not planned)"
    if plan.fits:
        return [f"fits: {what}"]
    if plan.remedy is None:
        return [f"does not fit: {what}", "  nothing that this command can change makes it fit"]
    changes = dict(plan.remedy)
    peak_bytes = changes.pop("peak_bytes")
    settings = ", ".join(f"{key} = {value!r}" for key, value in changes.items())
    return [f"does not fit: {what}", f"  it would with {settings}: {_gigabytes(peak_bytes)} GB"]


def _cost(plan: StagePlan) -> list[str]:
    job = plan.job
    per_process, per_node = start_up_cpu_bytes(job), min(DEVICES_PER_NODE, job.num_devices)
    weights, moments = checkpoint_bytes(job)
    offloaded = offloaded_cpu_bytes(job)
    lines = [
        f"CPU memory at the start: {_gigabytes(per_process)} GB a process, {_gigabytes(per_process * per_node)} GB "
        f"for {per_node} on a node"
        + (f"; then {_gigabytes(offloaded)} GB a process, offloaded" if offloaded else ""),
        f"a checkpoint: {_gigabytes(weights + moments)} GB, of which weights {_gigabytes(weights)} GB",
        f"FLOPs: {plan.flops_per_token:.3g} a token ({plan.executed_flops_per_token / plan.flops_per_token:.2f} times as many executed), "
        f"{plan.flops_per_token * job.training.num_tokens:.3g} for {_count(job.training.num_tokens)} tokens",
    ]
    if plan.tokens_per_second is None or plan.days is None:
        return [*lines, "time: not estimated for CPUs"]
    time = format_seconds(plan.days * 86400)
    return [
        *lines,
        f"time: {time} at {plan.tokens_per_second:,.0f} tokens/s, if the model FLOPs utilisation is {plan.mfu:.0%}",
    ]


def _gigabytes(num_bytes: float) -> str:
    """Two figures behind the point, more for models that are small.

    >>> _gigabytes(12.345e9), _gigabytes(1.2e6), _gigabytes(0)
    ('12.35', '0.0012', '-')
    """
    if not num_bytes:
        return "-"
    size = num_bytes / GIGABYTE
    return f"{size:,.2f}" if size >= 0.1 else f"{size:.2g}"


def _count(number: float) -> str:
    """A number of parameters or tokens.

    >>> _count(4_022_468_096), _count(5e11), _count(950_000)
    ('4.02B', '500B', '950K')
    """
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:g}"
