"""Memory of a training run by arithmetic on its shape: what `rlprior.training.engine` holds, and when. Nothing is built.

job = TrainingJob(shape=PRESETS["4b"], vocab_size=151_936, training=training, num_devices=64)
moments = memory_by_moment(job)               # {"loss": {"weights": bytes, ...}, "last layer": {...}, ...}
peak_bytes = max(sum(kinds.values()) for kinds in moments.values())

Within a step memory is largest at one of four moments: while the loss holds its logits, in the backward pass of the last layers, of the
first layer, and of the embeddings. Between them activations shrink and gradients grow, both in proportion.

The terms are those of `torch` 2.13 and `transformers` 5.17: a tensor that autograd saves counts once, with its whole storage.

Symbols, per token: D hidden size, A = heads x head dimension, C = key-value heads x head dimension, F width of the feed-forward network,
E experts, K experts of a token; N tokens of a micro-batch, T positions of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from rlprior.config import UsageError
from rlprior.models.presets import Shape, num_parameters
from rlprior.objectives.chunk_sizes import choose_block_rows, choose_chunk_rows
from rlprior.training.language_model import TrainingConfig, rows_of_rank
from rlprior.world import World

FLOAT32_BYTES = 4
KINDS = (
    "weights",
    "optimizer moments",
    "gradients",
    "gathered weights and gradients in flight",
    "activations",
    "attention masks",
    "working memory of a layer",
    "logits and gradient of the head",
)
MOMENTS = ("loss", "last layers", "first layer", "embeddings")

Memory = dict[str, float]
"""Bytes of one process by kind; the keys are `KINDS`."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A language-model stage on devices.

    Args:
        shape, vocab_size: the model.
        training: the stage; of it batch, lengths, precision and engine count.
        num_devices: processes, each with a device of its own.
        device_type: 'cuda' or 'cpu'; decides the precision 'auto' and the rows of logits that the loss holds.

    Raises:
        UsageError: a batch or a `shard_size` that cannot be shared out among the devices.
    """

    shape: Shape
    vocab_size: int
    training: TrainingConfig
    num_devices: int
    device_type: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise UsageError(f"the number of devices must be at least 1, not {self.num_devices}")
        rows_of_rank(self.training, World(0, self.num_devices))
        engine = self.training.engine
        if self.num_devices % self.shard_size:
            raise UsageError(
                f"engine.shard_size = {self.shard_size} must divide the {self.num_devices} devices"
            )
        if engine.cpu_offload and not (self.is_sharded and self.device_type == "cuda"):
            raise UsageError("engine.cpu_offload needs several GPUs; remove it")

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 wraps the model: with several processes, however many share a copy."""
        return self.num_devices > 1

    @property
    def shard_size(self) -> int:
        """Processes that share one copy of weights, gradients and moments."""
        return self.training.engine.shard_size or self.num_devices

    @property
    def precision(self) -> str:
        """Dtype of the matrix products."""
        if self.training.precision != "auto":
            return self.training.precision
        return "bfloat16" if self.device_type == "cuda" else "float32"

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element in matrix products."""
        return 2 if self.precision == "bfloat16" else FLOAT32_BYTES

    @property
    def is_autocast(self) -> bool:
        """One process in bfloat16: float32 between the products, where sharding keeps bfloat16."""
        return not self.is_sharded and self.compute_bytes == 2

    @property
    def residual_bytes(self) -> int:
        """Bytes of an element between the layers."""
        return FLOAT32_BYTES if self.is_autocast else self.compute_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of an element in the experts' grouped product, which autocast does not reach."""
        return self.residual_bytes

    @property
    def micro_batch_tokens(self) -> int:
        """N: tokens of one forward pass of a process, at most what it has."""
        share = self.training.batch_tokens // self.num_devices
        return min(self.training.micro_batch_tokens or share, share)

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of a process in a step."""
        return -(-self.training.batch_tokens // self.num_devices // self.micro_batch_tokens)

    @cached_property
    def num_parameters(self) -> int:
        """All parameters, embeddings included."""
        return num_parameters(self.shape, self.vocab_size)

    @cached_property
    def root_parameters(self) -> int:
        """Of FSDP2's root unit: embeddings, head, last norm."""
        embeddings = self.vocab_size * self.shape.hidden_size
        return embeddings * (1 if self.shape.tied_embeddings else 2) + self.shape.hidden_size

    @cached_property
    def layer_parameters(self) -> int:
        """Of one layer, which is one unit of FSDP2."""
        return (self.num_parameters - self.root_parameters) // self.shape.num_layers

    @property
    def head_parameters(self) -> int:
        """V D."""
        return self.vocab_size * self.shape.hidden_size


def memory_by_moment(job: TrainingJob) -> dict[str, Memory]:
    """Bytes of one process by kind at each moment of `MOMENTS`; with `cpu_offload`, those on the device."""
    last = job.shape.num_layers - 1
    # FSDP2 keeps the last layer's reduced gradients through the backward pass of the layer before it
    candidates = [_in_layer(job, index) for index in {last, max(last - 1, 0)}]
    moments = {
        "loss": _in_loss(job),
        "last layers": max(candidates, key=lambda memory: sum(memory.values())),
        "first layer": _in_layer(job, 0),
        "embeddings": _in_embeddings(job),
    }
    return {moment: {kind: memory.get(kind, 0.0) for kind in KINDS} for moment, memory in moments.items()}


def peak(moments: dict[str, Memory]) -> tuple[str, float]:
    """The moment with the most memory, and its bytes."""
    totals = {moment: sum(memory.values()) for moment, memory in moments.items()}
    largest = max(totals, key=lambda moment: totals[moment])
    return largest, totals[largest]


def start_up_cpu_bytes(job: TrainingJob) -> float:
    """CPU memory of one process while it holds the whole model in float32, before it keeps its shard."""
    return FLOAT32_BYTES * job.num_parameters


def offloaded_cpu_bytes(job: TrainingJob) -> float:
    """CPU memory of one process's weights, gradients and moments under `cpu_offload`, else 0."""
    return 16 * job.num_parameters / job.shard_size if job.training.engine.cpu_offload else 0.0


def checkpoint_bytes(job: TrainingJob) -> tuple[float, float]:
    """Weights, and the optimizer's two moments, of one checkpoint on disk: whole and float32 for any number of processes."""
    return FLOAT32_BYTES * job.num_parameters, 2 * FLOAT32_BYTES * job.num_parameters


def _always(job: TrainingJob, num_reduced_parameters: float) -> Memory:
    """What a process holds throughout, with the gradients of so many parameters complete."""
    if job.training.engine.cpu_offload:
        return {}
    share = FLOAT32_BYTES / job.shard_size
    accumulated = job.num_parameters if job.num_micro_batches > 1 else num_reduced_parameters
    return {
        "weights": share * job.num_parameters,
        "optimizer moments": 2 * share * job.num_parameters,
        "gradients": share * accumulated,
    }


def _in_loss(job: TrainingJob) -> Memory:
    """The end of the forward pass: all activations, and the loss with its gradients."""
    compute, width = job.compute_bytes, job.shape.hidden_size
    head = FLOAT32_BYTES * job.head_parameters
    weight_bytes = compute if job.is_sharded else FLOAT32_BYTES
    in_forward = _logits_bytes(job)
    if job.is_autocast:  # the float32 weight in bfloat16
        in_forward += compute * job.head_parameters
    # the backward pass scales both gradients into the dtypes of weight and hidden states
    in_backward = weight_bytes * job.head_parameters
    in_backward += job.residual_bytes * job.micro_batch_tokens * width
    gathered = 0.0
    if job.is_sharded:
        # the root unit stays gathered, and the last layer's buffer until the forward pass is over
        gathered = compute * (job.root_parameters + _flat_parameters(job))
    elif job.is_autocast:
        gathered = compute * _cast_parameters(job) * job.shape.num_layers
    return {
        **_always(job, 0),
        "gathered weights and gradients in flight": gathered,
        "activations": _saved_bytes(job) * job.shape.num_layers + _last_norm_bytes(job),
        "attention masks": _mask_bytes(job, job.shape.num_layers),
        "logits and gradient of the head": head
        + FLOAT32_BYTES * job.micro_batch_tokens * width
        + max(in_forward, in_backward),
    }


def _in_layer(job: TrainingJob, index: int) -> Memory:
    """The backward pass of a layer: activations of those up to it, gradients of those above."""
    compute, num_above = job.compute_bytes, job.shape.num_layers - 1 - index
    head_gradient = compute if job.is_sharded else FLOAT32_BYTES
    in_flight = head_gradient * job.head_parameters
    if job.is_sharded:
        # the layer's weights and gradients, the next one's buffer; the float32 gradients of the one before, being reduced
        in_flight += compute * (2 * job.layer_parameters + job.root_parameters)
        in_flight += compute * _flat_parameters(job) if index else 0
        in_flight += FLOAT32_BYTES * job.layer_parameters if num_above else 0
    elif job.is_autocast:
        num_cast = 1 if _recomputes(job) else index + 1
        in_flight += compute * _cast_parameters(job) * num_cast
    own = 0 if job.is_sharded else job.layer_parameters
    num_saved = index + 1
    recomputed = max(0.0, _layer_bytes(job) - _saved_bytes(job))
    return {
        **_always(job, num_above * job.layer_parameters + own),
        "gathered weights and gradients in flight": in_flight,
        "activations": _saved_bytes(job) * num_saved + recomputed,
        "attention masks": _mask_bytes(job, num_saved),
        "working memory of a layer": _backward_bytes(job),
    }


def _in_embeddings(job: TrainingJob) -> Memory:
    """The end of the backward pass: all gradients, those of embeddings and head whole."""
    compute, root = job.compute_bytes, job.root_parameters
    second = (
        job.head_parameters if job.shape.tied_embeddings else 0
    )  # as input and as output, before they are added
    if job.is_sharded:
        before = compute * (2 * root + second) + FLOAT32_BYTES * job.layer_parameters
        reducing = (compute + FLOAT32_BYTES) * root
        in_flight = max(before, reducing)
    else:
        again = root if job.num_micro_batches > 1 else 0
        in_flight = FLOAT32_BYTES * (second + again)
    return {**_always(job, job.num_parameters), "gathered weights and gradients in flight": in_flight}


def _recomputes(job: TrainingJob) -> bool:
    return job.training.engine.activation_checkpointing != "none"


def _flat_parameters(job: TrainingJob) -> int:
    """Of the buffer that a layer is gathered into before it is copied out; there is none where nobody else has a part."""
    return job.layer_parameters if job.shard_size > 1 else 0


def _cast_parameters(job: TrainingJob) -> int:
    """Matrices of a layer that autocast copies to bfloat16 and keeps; experts are not among them."""
    shape = job.shape
    matrices = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_key_value_heads)
    if shape.num_experts:
        return matrices + shape.hidden_size * shape.num_experts
    return matrices + 3 * shape.hidden_size * shape.intermediate_size


def _widths(shape: Shape) -> tuple[int, int, int, int]:
    """D, A, C and F."""
    query, key = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return shape.hidden_size, query, key, shape.intermediate_size


def _saved_bytes(job: TrainingJob) -> float:
    """What a layer keeps for the backward pass, masks left out."""
    kind = job.training.engine.activation_checkpointing
    if kind == "none":
        return _layer_bytes(job)
    width, query, key, network = _widths(job.shape)
    per_token = float(job.residual_bytes * width)
    if kind == "selective":
        # attention's output with its normaliser, and the products q, k, v and o
        per_token += job.compute_bytes * (2 * query + 2 * key + width) + FLOAT32_BYTES * job.shape.num_heads
        if job.shape.num_experts:  # of the experts nothing: their product is a grouped one
            per_token += (2 if job.is_autocast else FLOAT32_BYTES) * job.shape.num_experts
        else:
            per_token += job.compute_bytes * (2 * network + width)
    return per_token * job.micro_batch_tokens


def _layer_bytes(job: TrainingJob) -> float:
    """What a layer saves without recomputation, masks left out."""
    shape, compute = job.shape, job.compute_bytes
    width, query, key, network = _widths(shape)
    # norms: input in float32, normalised, and output; autocast casts the output anew for each product of it
    norms = {2: 16, 4: 24}[compute] if not job.is_autocast else (24 if shape.num_experts else 26)
    # query before its norm in float32, normalised, rotated; keys and values repeated for each head; attention's output
    attention = (4 + 5 * compute) * query + (4 + compute) * key
    normalisers = FLOAT32_BYTES * (2 * shape.num_heads + shape.num_key_value_heads + 2)
    if shape.num_experts:
        chosen = shape.num_experts_per_token
        router = (2 if job.is_autocast else FLOAT32_BYTES) * shape.num_experts + 40 * chosen
        router += 2 * width if job.is_sharded and compute == 2 else 0  # the router reads float32
        feed_forward = chosen * job.expert_bytes * (2 * width + 4 * network) + router
    else:
        feed_forward = 4 * compute * network
    return (norms * width + attention + normalisers + feed_forward) * job.micro_batch_tokens


def _last_norm_bytes(job: TrainingJob) -> float:
    """The norm after the last layer, with its output, which the loss keeps."""
    per_width = 12 if job.residual_bytes == FLOAT32_BYTES else 8
    return per_width * job.shape.hidden_size * job.micro_batch_tokens


def _backward_bytes(job: TrainingJob) -> float:
    """Gradients of intermediate values at the widest place of a layer, beyond the activations that are gone by then.

    Coefficients measured on CPU; the last norm's, with which the backward pass starts, is the least.
    """
    width, query, _, network = _widths(job.shape)
    compute, chosen = job.compute_bytes, job.shape.num_experts_per_token
    widest = max(16 * width, 8 * query)
    if chosen:
        feed_forward = max(12 * chosen * width, 2 * job.expert_bytes * chosen * network)
    else:
        feed_forward = 2 * compute * network
    return max(widest, feed_forward) * job.micro_batch_tokens


def _mask_bytes(job: TrainingJob, num_layers: int) -> float:
    """The boolean mask [rows, T, T], and its copy of numbers that each layer's attention makes and keeps unless it is recomputed."""
    num_copies = 1 if _recomputes(job) else num_layers
    return job.micro_batch_tokens * job.training.sequence_length * (1 + job.compute_bytes * num_copies)


def _logits_bytes(job: TrainingJob) -> float:
    """Logits of a chunk in float32, with probabilities, mask and temporaries of a block, on steps that log metrics, which need most.

    A device with so little memory that its chunks are smaller needs less.
    """
    vocabulary, tokens = job.vocab_size, job.micro_batch_tokens
    device = torch.device(job.device_type)
    rows = choose_chunk_rows(
        device, vocabulary, job.shape.hidden_size, logit_bytes=FLOAT32_BYTES, memory_bytes=10**15
    )
    block_rows = min(choose_block_rows(device, vocabulary), rows)
    return FLOAT32_BYTES * (min(rows, tokens) + 4.0 * min(block_rows, tokens)) * vocabulary
