"""What a plan says of memory and FLOPs: against the real engine on small models, and by hand for the paper's."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from bench.plan.run import CASE_KEYS, bytes_alive, measure, predict
from tests.small_study import Vocabulary
from torch.profiler import ProfilerActivity, profile

from rlprior.config import UsageError, decode
from rlprior.data.packing import attention_mask
from rlprior.models.causal_lm import build_model, packed_hidden_states
from rlprior.models.presets import PRESETS, ModelConfig
from rlprior.training.engine import EngineConfig, prepare_model
from rlprior.training.language_model import TrainingConfig
from rlprior.training.memory import (
    KINDS,
    TrainingJob,
    checkpoint_bytes,
    memory_by_moment,
    offloaded_cpu_bytes,
    peak,
    start_up_cpu_bytes,
)
from rlprior.training.planning import executed_flops_per_token, plan_stage
from rlprior.world import ALONE

QWEN3_VOCABULARY = 151_936


def make_job(
    shape: Any, *, vocab_size: int = QWEN3_VOCABULARY, num_devices: int = 64, device_type: Any = "cuda", **training: Any
) -> TrainingJob:  # fmt: skip
    tables = {
        "mixture": {"any": 1.0},
        "num_steps": 10,
        "sequence_length": 4096,
        "batch_tokens": 16_777_216,
        "micro_batch_tokens": 4096,
        **training,
    }
    return TrainingJob(
        shape=PRESETS[shape] if isinstance(shape, str) else shape,
        vocab_size=vocab_size,
        training=decode(TrainingConfig, tables, source="test"),
        num_devices=num_devices,
        device_type=device_type,
    )


# Against the engine


ROWS, LENGTH = 4, 32


def allocated_by_forward(num_layers: int, engine: EngineConfig, numbers: str, **shape: Any) -> int:
    """Bytes that a forward pass leaves behind, counted by torch's allocator.

    `numbers`: 'float32', 'autocast' (one process in bfloat16), or 'bfloat16' throughout, as FSDP2 gathers the weights of several.
    """
    config = ModelConfig(num_layers=num_layers, **shape)
    model: Any = build_model(config, Vocabulary(32), max_positions=LENGTH, seed=0).train()
    prepare_model(model, engine, "float32", ALONE)
    if numbers == "bfloat16":
        model.to(torch.bfloat16)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    mask = attention_mask(ids)
    autocast = torch.autocast("cpu", torch.bfloat16) if numbers == "autocast" else contextlib.nullcontext()
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, autocast:
        hidden = packed_hidden_states(model, ids, positions, mask)
    assert hidden.requires_grad  # keeps the graph
    *_, (_, alive) = bytes_alive(profiled)
    return alive


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("is_mixture", [False, True])
def test_activations_of_a_layer_are_those_that_the_model_saves(
    kind: Any, numbers: str, is_mixture: bool
) -> None:
    """Two layers more: what they save, to the byte but for the mixture's few tensors that do not grow with the tokens."""
    shape: dict[str, Any] = {
        "preset": "tiny",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    if is_mixture:
        shape |= {"num_experts": 8, "num_experts_per_token": 2}
    engine = EngineConfig(activation_checkpointing=kind)
    more, fewer = (allocated_by_forward(number, engine, numbers, **shape) for number in (4, 2))
    saved: list[float] = []
    for num_layers in (4, 2):
        job = make_job(
            ModelConfig(num_layers=num_layers, **shape).shape,
            vocab_size=len(Vocabulary(32)),
            num_devices=2 if numbers == "bfloat16" else 1,
            device_type="cpu",
            sequence_length=LENGTH,
            batch_tokens=2 * ROWS * LENGTH,
            micro_batch_tokens=ROWS * LENGTH,
            precision="float32" if numbers == "float32" else "bfloat16",
            engine={"activation_checkpointing": kind},
        )
        memory = memory_by_moment(job)["loss"]
        saved.append(memory["activations"] + memory["attention masks"])
        # recomputed, they go with the autocast block, whose end is measured
        if numbers == "autocast" and kind == "none":
            saved[-1] += memory["gathered weights and gradients in flight"]
    expected = saved[0] - saved[1]
    if kind != "none":  # each layer keeps the state of the random numbers, a constant of torch
        expected += 2 * torch.get_rng_state().numel()
    router = 2 * 4 * 8 * 64 if is_mixture else 0  # its weight in float32, and some offsets
    assert more - fewer == pytest.approx(expected, abs=router + 1200 if is_mixture else 0)


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_a_step_takes_what_is_planned(preset: str) -> None:
    """The stage's own step in this process. Weights and moments to the byte; FLOPs within rounding; the peak within 5%.

    What the peak leaves out: temporaries of single operations, of which only the widest are planned.
    """
    case = dict(zip(CASE_KEYS, (preset, 2, 1, 64, "none", 1, "float32"), strict=True))
    planned, found = predict(case), measure(case, ALONE)
    assert planned["state_bytes"] == found["state_bytes"]
    assert planned["flops"] == pytest.approx(found["flops"], rel=1e-6)
    assert planned["peak_bytes"] == pytest.approx(found["peak_bytes"], rel=0.05)


@pytest.mark.parametrize("preset", ["tiny", "20m", "tiny-moe"])
def test_weights_gradients_and_moments_are_exact_sums(preset: str) -> None:
    model: Any = build_model(ModelConfig(preset=preset), Vocabulary(32), max_positions=16, seed=0)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    job = make_job(preset, vocab_size=len(Vocabulary(32)), num_devices=1)
    memory = memory_by_moment(job)["embeddings"]
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    for kind, tensors in (
        ("weights", parameters),
        ("gradients", [parameter.grad for parameter in parameters]),
        ("optimizer moments", moments),
    ):
        assert memory[kind] == sum(tensor.nbytes for tensor in tensors), kind
    assert checkpoint_bytes(job) == (memory["weights"], memory["optimizer moments"])
    assert start_up_cpu_bytes(job) == memory["weights"]


# By hand. 64 devices that share one copy, rows of 4096 as micro-batches, bfloat16; vocabulary 151,936, tied.

# parameters: total, of a layer, of embeddings and last norm (V D + D); by arithmetic on the paper's Table 1
PARAMETERS = {
    "1b": (1_048_211_968, 29_101_312, 233_375_232),
    "4b": (4_022_468_096, 100_930_816, 388_958_720),
    "5b-a0.3b": (4_803_424_256, 387_320_064, 155_583_488),
    "10b-a0.5b": (9_529_054_720, 580_979_968, 233_375_232),
}
# bytes that a token saves in a layer: 16 D + 14 A + 6 C for norms and attention, with A and C its widths of queries and of keys; 4 for
# each head's normaliser of attention (1), norm of query and key (1, and 1 a key-value head), and for each of the layer's two norms
_DENSE = {
    # 8 F for the network
    "1b": 16 * 1536 + 14 * 2048 + 6 * 512 + 4 * (2 * 16 + 4 + 2) + 8 * 4608,  # = 93,336
    "4b": 16 * 2560 + 14 * 4096 + 6 * 1024 + 4 * (2 * 32 + 8 + 2) + 8 * 9728,  # = 182,568
}
_MIXTURES = {
    # 12 experts of a token: input 2 D, two halves of gate and up, activation and product 8 F, output 2 D, 40 of indices and weights;
    # 384 scores of 4 bytes, and 2 D more for the router's input in float32
    "5b-a0.3b": 16 * 1024 + 14 * 4096 + 6 * 512 + 4 * (2 * 32 + 4 + 2)
    + 12 * (4 * 1024 + 8 * 320 + 40) + 4 * 384 + 2 * 1024,  # = 161,016
    "10b-a0.5b": 16 * 1536 + 14 * 4096 + 6 * 512 + 4 * (2 * 32 + 4 + 2)
    + 12 * (4 * 1536 + 8 * 320 + 40) + 4 * 384 + 2 * 1536,  # = 194,808
}  # fmt: skip
SAVED_BYTES_PER_TOKEN = {"1b": 93_336, "4b": 182_568, "5b-a0.3b": 161_016, "10b-a0.5b": 194_808}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_the_papers_models_need_what_arithmetic_says(preset: str) -> None:
    total, layer, root = PARAMETERS[preset]
    shape = PRESETS[preset]
    tokens, layers, width = 4096, shape.num_layers, shape.hidden_size
    assert total == layers * layer + root
    assert {**_DENSE, **_MIXTURES}[preset] == SAVED_BYTES_PER_TOKEN[preset]
    moments = memory_by_moment(make_job(preset))
    for memory in moments.values():
        # 64 micro-batches of a row: the gradients of the earlier ones are there all the time
        assert memory["weights"] == 4 * total / 64
        assert memory["optimizer moments"] == 8 * total / 64
        assert memory["gradients"] == 4 * total / 64
    loss, backward = moments["loss"], moments["embeddings"]
    # the last norm: its input in float32, normalised and output in bfloat16
    saved = SAVED_BYTES_PER_TOKEN[preset] * tokens * layers + 8 * width * tokens
    assert loss["activations"] == saved
    # one boolean mask of the row, and one in bfloat16 for each layer
    assert loss["attention masks"] == 4096**2 * (1 + 2 * layers)
    # embeddings whole and the last layer's buffer, in bfloat16
    assert loss["gathered weights and gradients in flight"] == 2 * (root + layer)
    # the head's gradient and that of the hidden states in float32, logits of 2048 rows or of D, and probabilities, mask and two
    # temporaries of a block of 2^26 numbers, which is 441 rows; or else both gradients again in bfloat16, which is less
    head = QWEN3_VOCABULARY * width
    logits = 4 * (max(2048, width) + 4 * 441) * QWEN3_VOCABULARY
    assert loss["logits and gradient of the head"] == 4 * head + 4 * tokens * width + logits
    # embeddings and head, one tensor: weights, and two gradients before they are added, in bfloat16, while a layer's gradients are
    # reduced in float32; or their sum with its copy to be reduced in float32
    held = max(2 * root + 2 * root + 2 * head + 4 * layer, 2 * root + 4 * root)
    assert backward["gathered weights and gradients in flight"] == held


def test_a_layers_backward_pass_by_hand() -> None:
    """10b-a0.5b with full recomputation: most of the memory is in the layer at hand."""
    job = make_job("10b-a0.5b", engine={"activation_checkpointing": "full"})
    total, layer, root = PARAMETERS["10b-a0.5b"]
    memory = memory_by_moment(job)["last layers"]
    head = QWEN3_VOCABULARY * 1536
    # this layer's weights and gradients, the next one's buffer, all embeddings, the head's gradient; the layer above in float32
    in_flight = 2 * (layer + layer + layer + root + head) + 4 * layer
    assert memory["gathered weights and gradients in flight"] == in_flight
    # of 15 layers the input in bfloat16, of this one the rest too
    inputs = 15 * 2 * 1536 * 4096
    assert memory["activations"] == inputs + (SAVED_BYTES_PER_TOKEN["10b-a0.5b"] - 2 * 1536) * 4096
    assert memory["attention masks"] == 4096**2 * (1 + 2)
    assert memory["gradients"] == 4 * total / 64


def test_copies_of_the_model_are_whole_on_their_group() -> None:
    shared, copied = make_job("1b"), make_job("1b", engine={"shard_size": 8})
    one, other = (memory_by_moment(job)["loss"] for job in (shared, copied))
    assert other["weights"] == 8 * one["weights"]
    assert {kind for kind in KINDS if one[kind] != other[kind]} == {
        "weights",
        "gradients",
        "optimizer moments",
    }


def test_offloaded_state_is_in_cpu_memory() -> None:
    job = make_job("1b", num_devices=8, engine={"cpu_offload": True})
    memory = memory_by_moment(job)["loss"]
    assert memory["weights"] == memory["gradients"] == memory["optimizer moments"] == 0
    assert offloaded_cpu_bytes(job) == 16 * PARAMETERS["1b"][0] / 8
    assert offloaded_cpu_bytes(make_job("1b")) == 0


@pytest.mark.parametrize("preset", ["1b", "5b-a0.3b"])
def test_recomputation_and_smaller_micro_batches_save_memory(preset: str) -> None:
    kinds = [make_job(preset, engine={"activation_checkpointing": kind}) for kind in ("none", "selective", "full")]  # fmt: skip
    activations = [memory_by_moment(job)["loss"]["activations"] for job in kinds]
    assert activations == sorted(activations, reverse=True)
    assert activations[1] < activations[0] / 1.5
    executed = [executed_flops_per_token(job) for job in kinds]
    assert executed == sorted(executed)
    large = make_job(preset, micro_batch_tokens=16_384)
    assert peak(memory_by_moment(large))[1] > peak(memory_by_moment(kinds[0]))[1]


# Plans


def test_time_by_hand() -> None:
    """1b: 6 FLOPs a parameter outside norms and look-up, and 6 L A T for causal attention; 500B tokens on 64 H100s at 40%."""
    plan = plan_stage(make_job("1b", num_devices=64), device="h100", memory_gb=80, mfu=0.4)
    active, head = 814_838_272, QWEN3_VOCABULARY * 1536
    flops = 6 * (active + head) + 6 * 28 * 2048 * 4096
    assert plan.flops_per_token == pytest.approx(flops, rel=1e-12)
    speed = 64 * 989.4e12 * 0.4 / flops
    assert plan.tokens_per_second == pytest.approx(speed, rel=1e-12)
    assert plan.days == pytest.approx(10 * 16_777_216 / speed / 86_400, rel=1e-12)
    # 28 layers of norms of 2 x 1536 and 2 x 128, and the last: no products; attention in 7 products of the whole square
    products = 6 * (active + head - 28 * (2 * 1536 + 2 * 128) - 1536)
    assert plan.executed_flops_per_token == pytest.approx(products + 7 * 2 * 28 * 2048 * 4096, rel=1e-12)


def test_what_does_not_fit_has_the_nearest_settings_that_do() -> None:
    job = make_job("4b", num_devices=8, micro_batch_tokens=16_384)
    plan = plan_stage(job, device="h100", memory_gb=80, mfu=0.4)
    assert not plan.fits
    assert plan.remedy is not None
    # fewer tokens without recomputation come before more recomputation and more devices
    assert plan.remedy["micro_batch_tokens"] < 16_384
    assert "activation_checkpointing" not in plan.remedy
    assert "devices" not in plan.remedy
    mended = make_job("4b", num_devices=8, micro_batch_tokens=plan.remedy["micro_batch_tokens"])
    again = plan_stage(mended, device="h100", memory_gb=80, mfu=0.4)
    assert again.fits
    assert again.remedy is None
    assert again.peak_bytes == plan.remedy["peak_bytes"]


def test_a_model_too_large_for_a_device_asks_for_recomputation_then_for_devices() -> None:
    recomputed = plan_stage(make_job("4b", num_devices=8), device="h100", memory_gb=45, mfu=0.4).remedy
    assert recomputed is not None
    assert recomputed.keys() == {"activation_checkpointing", "peak_bytes"}
    alone = plan_stage(make_job("10b-a0.5b", num_devices=1), device="h100", memory_gb=80, mfu=0.4).remedy
    assert alone is not None
    assert alone["devices"] > 1
    assert plan_stage(make_job("10b-a0.5b"), device="h100", memory_gb=2, mfu=0.4).remedy is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_devices": 0}, "the number of devices must be at least 1, not 0"),
        ({"num_devices": 48}, "a batch of 4096 rows .* cannot be shared out evenly among 48 processes"),
        ({"engine": {"shard_size": 3}}, r"engine\.shard_size = 3 must divide the 64 devices"),
        ({"num_devices": 1, "engine": {"cpu_offload": True}}, r"engine\.cpu_offload needs several GPUs"),
    ],
)
def test_devices_that_cannot_share_the_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_job("1b", **changes)


@pytest.mark.parametrize(("name", "value"), [("mfu", 0.0), ("mfu", 40.0), ("memory_gb", 0.0)])
def test_numbers_that_make_no_sense_are_refused(name: str, value: float) -> None:
    options = {"mfu": 0.4, "memory_gb": 80.0, name: value}
    with pytest.raises(UsageError, match="must be above 0"):
        plan_stage(make_job("1b"), device="h100", **options)
