"""Predicted against measured: memory and FLOPs of training steps of small models on CPUs, each case in fresh processes.

    python -m bench.plan.run                # a few minutes on two cores
    python -m bench.plan.run --only tiny-moe

Memory is measured in the second step, when the optimizer's moments exist, in one of two ways. One process: what torch allocates, as the
profiler reports every allocation and release from before the model is built. Several: the peak of the process's resident memory, less what
was resident after a step of a smaller model, since the profiler does not see what gloo's threads release. Resident memory is noted for one
process too, to show how far the two ways agree. FLOPs are counted by torch's counter over a third step. The stage's own `prepare_model`
and `train_step` run. Writes JSON with every case, the machine and the versions.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import platform
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.profiler._utils import traverse_dfs
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from rlprior.config import decode
from rlprior.data.packing import PackedBatch
from rlprior.models.causal_lm import build_model
from rlprior.models.presets import ModelConfig
from rlprior.training.engine import prepare_model
from rlprior.training.language_model import TrainingConfig, train_step
from rlprior.training.memory import TrainingJob, memory_by_moment, peak
from rlprior.training.planning import executed_flops_per_token
from rlprior.training.update import Updater
from rlprior.world import World, end_process, join_world

VOCABULARY = 4096
# preset, rows of a process, rows of a micro-batch, positions of a row, recomputation, processes, precision
CASES: list[tuple[str, int, int, int, str, int, str]] = [
    *[
        (preset, rows, rows // parts, 256, kind, 1, "float32")
        for preset, rows in (("tiny", 16), ("tiny-moe", 16), ("20m", 8))
        for kind, parts in (("none", 1), ("none", 4), ("selective", 1), ("full", 4))
    ],
    *[
        (preset, 4, micro_rows, 256, kind, 2, "float32")
        for preset in ("tiny", "tiny-moe", "20m")
        for kind, micro_rows in (("none", 4), ("full", 2))
    ],
    ("20m", 4, 1, 1024, "none", 1, "float32"),
    ("20m", 8, 8, 256, "none", 1, "bfloat16"),
    ("20m", 4, 2, 256, "none", 2, "bfloat16"),
]
CASE_KEYS = ("preset", "rows", "micro_rows", "length", "recompute", "processes", "precision")


class Vocabulary:
    """What building a model asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __len__(self) -> int:
        return VOCABULARY


def training_of(case: dict[str, Any]) -> TrainingConfig:
    """The stage of a case."""
    length = case["length"]
    tables = {
        "mixture": {"any": 1.0},
        "num_steps": 10,
        "sequence_length": length,
        "batch_tokens": case["processes"] * case["rows"] * length,
        "micro_batch_tokens": case["micro_rows"] * length,
        "precision": case["precision"],
        "engine": {"activation_checkpointing": case["recompute"]},
    }
    return decode(TrainingConfig, tables, source="benchmark")


def predict(case: dict[str, Any]) -> dict[str, float]:
    """Peak bytes of a process, bytes of weights and moments, and FLOPs of a step of a process."""
    job = TrainingJob(
        shape=ModelConfig(preset=case["preset"]).shape,
        vocab_size=VOCABULARY,
        training=training_of(case),
        num_devices=case["processes"],
        device_type="cpu",
    )
    moments = memory_by_moment(job)
    moment, peak_bytes = peak(moments)
    memory = moments[moment]
    return {
        "peak_bytes": peak_bytes,
        "state_bytes": memory["weights"] + memory["optimizer moments"],
        "flops": executed_flops_per_token(job) * case["rows"] * case["length"],
    }


def random_batch(num_rows: int, length: int) -> PackedBatch:
    """Rows of one document each."""
    ids = torch.randint(VOCABULARY, (num_rows, length + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).expand(num_rows, length).contiguous()
    zeros = torch.zeros(num_rows, length, dtype=torch.long)
    return PackedBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, zeros, zeros[:, 0])


@dataclass
class Stage:
    """What the stage sets up, and a step of it."""

    case: dict[str, Any]
    world: World

    def __post_init__(self) -> None:
        case, self.training = self.case, training_of(self.case)
        config = ModelConfig(preset=case["preset"], num_layers=case.get("layers"))
        model = build_model(config, Vocabulary(), max_positions=case["length"], seed=0)
        self.module = prepare_model(model.train(), self.training.engine, self.training.precision, self.world)
        self.updater = Updater(self.module, self.training.optimizer)
        self.batch = random_batch(case["rows"], case["length"])

    def step(self, number: int) -> None:
        """One update, with metrics, as the steps that log have them."""
        options: dict[str, Any] = {"rate": 1e-3, "step": number, "seed": 0, "with_metrics": True}
        train_step(self.module, self.updater, self.batch, self.training, world=self.world, **options)

    @property
    def state_bytes(self) -> int:
        """Of this process's weights and moments."""
        tensors = list(self.module.parameters())
        for moments in self.updater.optimizer.state.values():
            tensors += [moments["exp_avg"], moments["exp_avg_sq"]]
        return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def measure(case: dict[str, Any], world: World) -> dict[str, float]:
    """The same of this process, by its allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stage = Stage(case, world)
        stage.step(1)
        with record_function("measured step"):
            stage.step(2)
    with count_flops() as counter:
        stage.step(3)
    return {
        "peak_bytes": peak_of_step(profiled),
        "state_bytes": stage.state_bytes,
        "flops": counter.get_total_flops(),
    }


def measure_resident(case: dict[str, Any], world: World) -> dict[str, float]:
    """The same by its resident memory, beyond that after a step of one layer."""
    stage: Stage | None = Stage({**case, "layers": 1}, world)
    stage.step(1)
    stage = None
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    stage = Stage(case, world)
    stage.step(1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    stage.step(2)
    [peak_kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    with count_flops() as counter:
        stage.step(3)
    return {
        "peak_bytes": int(peak_kilobytes) * 1024 - before,
        "state_bytes": stage.state_bytes,
        "flops": counter.get_total_flops(),
    }


def bytes_alive(profiled: Any) -> Iterator[tuple[int, int]]:
    """Times in nanoseconds of every allocation and release, and the bytes then alive of what was allocated under the profiler."""
    events = traverse_dfs(profiled.profiler.kineto_results.experimental_event_tree())
    changes = [event for event in events if event.tag == _EventType.Allocation]
    sizes: dict[int, int] = {}
    alive = 0
    for event in sorted(changes, key=lambda event: event.start_time_ns):
        pointer, num_bytes = event.extra_fields.ptr, event.extra_fields.alloc_size
        if num_bytes > 0:
            sizes[pointer] = num_bytes
            alive += num_bytes
        else:  # of blocks from before, the profiler may report a size that is not theirs
            alive -= sizes.pop(pointer, 0)
        yield event.start_time_ns, alive


def peak_of_step(profiled: Any) -> int:
    """Most bytes alive during the measured step, those from before included."""
    events = profiled.profiler.kineto_results.events()
    [step] = [event for event in events if event.name() == "measured step"]
    inside = [alive for time, alive in bytes_alive(profiled) if step.start_ns() <= time <= step.end_ns()]
    return max(inside)


def count_flops() -> FlopCounterMode:
    """torch's counter, told the operations of CPUs and of experts: its own formula for attention on GPUs, two for each product."""
    aten = torch.ops.aten

    def grouped(left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        # rows of one matrix each: [S, D] x [E, D, F]; its weight gradient: [D, S] x [S, F], every row once
        return 2 * left[0] * left[1] * right[-1]

    def linear(inputs: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * inputs[0] * inputs[1] * weight[0]

    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
        aten.addmm_: aten.addmm,
    }
    mapping = {operation: inspect.unwrap(flop_registry[like]) for operation, like in known.items()}
    mapping[aten._grouped_mm] = grouped
    mapping[torch.ops.mkldnn._linear_pointwise] = linear
    return FlopCounterMode(display=False, custom_mapping=mapping)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Measure a case in fresh processes, and set the prediction beside it."""
    predicted = predict(case)
    resident = in_processes({**case, "resident": True})
    measured = in_processes(case) if case["processes"] == 1 else resident
    ratios = {key: predicted[key] / value for key, value in measured.items()}
    measured["resident_peak_bytes"] = resident["peak_bytes"]
    return {"case": case, "predicted": predicted, "measured": measured, "predicted_over_measured": ratios}


def in_processes(case: dict[str, Any]) -> dict[str, float]:
    """What the first process of a case measured."""
    command = [sys.executable, "-m", "bench.plan.run", "--case", json.dumps(case)]
    if case["processes"] > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case["processes"])]
        command[1:2] = [*launch, "-m"]
    # large blocks go back to the system when they are released, so that resident memory follows what is alive
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "16384"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


def describe(results: list[dict[str, Any]]) -> dict[str, float]:
    """The largest errors."""
    return {
        f"largest_error_{key}": max(abs(result["predicted_over_measured"][key] - 1) for result in results)
        for key in ("peak_bytes", "state_bytes", "flops")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PRESET")
    parser.add_argument("--out", type=Path, default=Path("bench/results/plan-cpu.json"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        warnings.simplefilter("ignore")
        with join_world() as world:
            how = measure_resident if arguments.case.get("resident") else measure
            measured = how(arguments.case, world)
            if world.is_main:
                print(json.dumps(measured))
        end_process(0)
    results: list[dict[str, Any]] = []
    for case in (dict(zip(CASE_KEYS, values, strict=True)) for values in CASES):
        if arguments.only in (None, case["preset"]):
            results.append(run_case(case))
            ratios = results[-1]["predicted_over_measured"]
            print(
                " ".join(f"{value:>9}" for value in case.values()),
                *(f"{r:8.3f}" for r in ratios.values()),
                flush=True,
            )
    [processor, *_] = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) or [
        platform.processor()
    ]
    content = {
        "command": "python -m bench.plan.run",
        "machine": {"processor": processor, "torch": torch.__version__},
        "largest_errors": describe(results),
        "results": results,
    }
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(content["largest_errors"], f"written: {arguments.out}", sep="\n")


if __name__ == "__main__":
    main()
