"""What a language-model stage needs of its devices, and how long it takes, before any of them is there.

plan = plan_stage(job, device="h100", memory_gb=80, mfu=0.4)
plan.fits, plan.days, plan.remedy
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rlprior.config import UsageError
from rlprior.models.presets import num_active_parameters, training_flops_per_token
from rlprior.training.engine import EngineConfig
from rlprior.training.memory import (
    Memory,
    TrainingJob,
    checkpoint_bytes,
    memory_by_moment,
    offloaded_cpu_bytes,
    peak,
    start_up_cpu_bytes,
)
from rlprior.training.throughput import PEAKS

GIGABYTE = 1e9
RESERVED_FRACTION = 0.1
"""Of a device's memory, kept free for what is not planned: the CUDA context, communication buffers, fragmentation."""
DEVICES_PER_NODE = 8
MAX_DEVICES = 4096
RECOMPUTATIONS = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage on its devices. Bytes are of one process, which has one device.

    Attributes:
        job: what was planned.
        memory_gb: of a device, in 10^9 bytes.
        moments: bytes by kind at each moment of a step.
        peak_moment, peak_bytes: the largest of them.
        flops_per_token: of the model, forward and backward: what MFU counts.
        executed_flops_per_token: what is computed; see `executed_flops_per_token`.
        tokens_per_second, days: at the MFU that was asked about; None on CPUs.
        remedy: the nearest settings that fit, where these do not; None where none do.
    """

    job: TrainingJob
    device: str
    mfu: float
    memory_gb: float
    moments: dict[str, Memory]
    peak_moment: str
    peak_bytes: float
    flops_per_token: float
    executed_flops_per_token: float
    tokens_per_second: float | None
    days: float | None
    remedy: dict[str, Any] | None

    @property
    def fits(self) -> bool:
        """Whether the peak leaves `RESERVED_FRACTION` of the device free."""
        return _fits(self.peak_bytes, self.memory_gb)

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        job, (weights, moments) = self.job, checkpoint_bytes(self.job)
        return {
            "parameters": {
                "total": job.num_parameters,
                "active_without_embeddings": num_active_parameters(job.shape),
            },
            "devices": job.num_devices,
            "device": self.device,
            "shard_size": job.shard_size,
            "precision": job.precision,
            "micro_batch_tokens": job.micro_batch_tokens,
            "micro_batches": job.num_micro_batches,
            "activation_checkpointing": job.training.engine.activation_checkpointing,
            "memory_bytes": self.moments,
            "peak": {"moment": self.peak_moment, "bytes": self.peak_bytes},
            "device_memory_gb": self.memory_gb,
            "fits": self.fits,
            "remedy": self.remedy,
            "cpu_bytes": {
                "start_per_process": start_up_cpu_bytes(job),
                "offloaded_per_process": offloaded_cpu_bytes(job),
            },
            "checkpoint_bytes": {"weights": weights, "optimizer": moments},
            "flops_per_token": {"model": self.flops_per_token, "executed": self.executed_flops_per_token},
            "tokens": job.training.num_tokens,
            "flops": self.flops_per_token * job.training.num_tokens,
            "mfu": self.mfu,
            "tokens_per_second": self.tokens_per_second,
            "days": self.days,
        }


def plan_stage(job: TrainingJob, *, device: str, memory_gb: float, mfu: float) -> StagePlan:
    """Memory, time and, where the memory does not suffice, the nearest settings with which it does.

    days = tokens x flops_per_token / (devices x peak FLOP/s x mfu) / 86400

    Args:
        job: the stage and its devices.
        device: key of `PEAKS`, or 'cpu', whose time is not estimated.
        memory_gb: of each device, in 10^9 bytes.
        mfu: model FLOPs utilisation, above 0 and at most 1.

    Raises:
        UsageError: a value that makes no sense.
    """
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu {mfu} must be above 0 and at most 1, for example 0.4")
    if not memory_gb > 0:
        raise UsageError(f"--memory {memory_gb} must be above 0, for example 80 (in GB)")
    moments = memory_by_moment(job)
    peak_moment, peak_bytes = peak(moments)
    flops = training_flops_per_token(job.shape, job.vocab_size, job.training.sequence_length)
    speed = None
    if device in PEAKS:
        speed = job.num_devices * getattr(PEAKS[device], job.precision) * mfu / flops
    return StagePlan(
        job=job,
        device=device,
        mfu=mfu,
        memory_gb=memory_gb,
        moments=moments,
        peak_moment=peak_moment,
        peak_bytes=peak_bytes,
        flops_per_token=flops,
        executed_flops_per_token=executed_flops_per_token(job),
        tokens_per_second=speed,
        days=None if speed is None else job.training.num_tokens / speed / 86400,
        remedy=None if _fits(peak_bytes, memory_gb) else find_remedy(job, memory_gb),
    )


def executed_flops_per_token(job: TrainingJob) -> float:
    """FLOPs that the engine executes for one token: the matrix products, attention and what is computed again.

    Beyond the model's own: attention computes the masked half too, and its backward pass has five products for the forward pass's two,
    as it forms the scores anew; 'full' recomputation repeats a layer's forward pass but for its last product, and 'selective' the
    experts', whose grouped product it does not keep.
    """
    shape, kind = job.shape, job.training.engine.activation_checkpointing
    norms = shape.num_layers * 2 * (shape.hidden_size + shape.head_dim) + shape.hidden_size
    matrices = num_active_parameters(shape) - norms
    attention = 2 * job.training.sequence_length * shape.num_heads * shape.head_dim * shape.num_layers
    flops = 6.0 * (matrices + job.head_parameters) + (2 + 5) * attention
    network = shape.num_layers * shape.hidden_size * shape.intermediate_size
    if kind == "full":
        flops += 2 * (matrices - (0 if shape.num_experts else network)) + 2 * attention
    elif kind == "selective":
        flops += 2 * 3 * network * shape.num_experts_per_token
    return flops


def find_remedy(job: TrainingJob, memory_gb: float) -> dict[str, Any] | None:
    """The first settings that fit: as few devices as now or twice, four times, ... as many; then the least recomputation; then the
    largest micro-batch. None where even `MAX_DEVICES` do not suffice.
    """
    for candidate in _candidates(job):
        if _fits(peak(memory_by_moment(candidate))[1], memory_gb):
            return _differences(job, candidate)
    return None


def _fits(num_bytes: float, memory_gb: float) -> bool:
    return num_bytes <= (1 - RESERVED_FRACTION) * memory_gb * GIGABYTE


def _candidates(job: TrainingJob) -> Iterator[TrainingJob]:
    num_devices = job.num_devices
    while num_devices <= max(MAX_DEVICES, job.num_devices):
        for recomputation in RECOMPUTATIONS[
            RECOMPUTATIONS.index(job.training.engine.activation_checkpointing) :
        ]:
            engine = replace(job.training.engine, activation_checkpointing=recomputation, shard_size=None)
            for tokens in _micro_batches(job):
                training = replace(job.training, engine=engine, micro_batch_tokens=tokens)
                try:
                    yield replace(job, training=training, num_devices=num_devices)
                except UsageError:  # a batch that so many cannot share out evenly
                    continue
        num_devices *= 2


def _micro_batches(job: TrainingJob) -> Iterator[int]:
    """The job's own, and halves of its rows down to one."""
    rows = job.micro_batch_tokens // job.training.sequence_length
    while rows:
        yield rows * job.training.sequence_length
        rows //= 2


def _differences(job: TrainingJob, other: TrainingJob) -> dict[str, Any]:
    """Settings of `other` that `job` has otherwise, by the names that the command line has for them."""
    engine: EngineConfig = other.training.engine
    found: dict[str, Any] = {}
    if other.num_devices != job.num_devices:
        found["devices"] = other.num_devices
    if other.shard_size != job.shard_size and job.training.engine.shard_size is not None:
        found["shard_size"] = other.shard_size
    if engine.activation_checkpointing != job.training.engine.activation_checkpointing:
        found["activation_checkpointing"] = engine.activation_checkpointing
    if other.micro_batch_tokens != job.micro_batch_tokens:
        found["micro_batch_tokens"] = other.micro_batch_tokens
    return found | {"peak_bytes": peak(memory_by_moment(other))[1]}
