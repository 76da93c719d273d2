"""`rlprior plan`: memory, time and checkpoints of training on devices that are not rented yet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rlprior.config import UsageError

SUMMARY = "memory, time and checkpoints of training on devices that are not rented yet"
EXAMPLES = [
    "rlprior plan train.toml --devices 8 --memory 80",
    "rlprior plan --model 4b --devices 64 --tokens 500e9",
    "rlprior plan --model 10b-a0.5b --devices 64 --training.engine.activation_checkpointing=full",
]

PRESET_OPTIONS: dict[str, tuple[Any, str]] = {
    "sequence-length": (4096, "positions of a row"),
    "batch-tokens": (16_777_216, "tokens of a step"),
    "tokens": (500e9, "tokens of the whole training"),
    "vocab-size": (151_936, "entries of the tokenizer"),
}
"""The paper's pre-training (it says 16M tokens a step), with Qwen3's vocabulary: what a file would say."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "file", type=Path, nargs="?", metavar="FILE.toml", help="settings of `rlprior train` or of a study"
    )
    what.add_argument("--model", metavar="PRESET", help="a preset, in place of a file")
    parser.add_argument(
        "--devices", type=int, default=8, metavar="N", help="processes, one a device (default: 8)"
    )
    parser.add_argument("--memory", type=float, default=80, metavar="GB", help="of a device (default: 80)")
    parser.add_argument(
        "--device",
        default="h100",
        help="a100, h100, h200, b200, ... or cpu, whose time is not estimated (default: h100)",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="SHARE", help="model FLOPs utilisation (default: 0.4)"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in bytes")
    preset = parser.add_argument_group("with --model")
    for name, (default, text) in PRESET_OPTIONS.items():
        preset.add_argument(
            f"--{name}", type=type(default), metavar="N", help=f"{text} (default: {default:,.0f})"
        )


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan of every stage."""
    from rlprior.study.sizing import describe, jobs_of_file, jobs_of_preset, place
    from rlprior.training.planning import plan_stage

    where = place(known.device, known.devices)
    given = {name: getattr(known, name.replace("-", "_")) for name in PRESET_OPTIONS}
    if known.model:
        options = {
            name: default if given[name] is None else given[name]
            for name, (default, _) in PRESET_OPTIONS.items()
        }
        jobs = jobs_of_preset(
            known.model,
            where,
            sequence_length=options["sequence-length"],
            batch_tokens=options["batch-tokens"],
            num_tokens=options["tokens"],
            vocab_size=options["vocab-size"],
            overrides=overrides,
        )
    else:
        vocab_size = given.pop("vocab-size")
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"--{name} goes with --model; a file says it itself")
        jobs = jobs_of_file(known.file, where, overrides, vocab_size)
    plans = {
        name: plan_stage(job, device=known.device, memory_gb=known.memory, mfu=known.mfu)
        for name, job in jobs.items()
    }
    if known.json:
        print(json.dumps({name: plan.as_data() for name, plan in plans.items()}, indent=2))
    else:
        print("\n\n".join(describe(name, plan) for name, plan in plans.items()))
        if len(plans) > 1:
            print("\nnot planned: reinforcement learning and evaluation, which run in one process")
    return 0
