"""`rlprior rl`: reinforcement learning with verifiable rewards, from a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlprior.commands.options import (
    add_init_from,
    add_out,
    add_track,
    load_file,
    make_alone,
    output_directory,
)

SUMMARY = "reinforcement learning with verifiable rewards, from a Hugging Face folder"
EXAMPLES = [
    "rlprior rl rl.toml --init-from runs/ce/checkpoints/step-00000400 --out runs/ce-rl",
    "torchrun --nproc-per-node 8 -m rlprior rl rl.toml --init-from MODEL --out runs/ce-rl",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="task and RL settings")
    add_init_from(parser)
    add_track(parser)
    add_out(parser)


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Reinforcement learning."""
    from rlprior.rl.loop import RLRunConfig
    from rlprior.runs.identity import input_identity
    from rlprior.sampling.engines import check_engine
    from rlprior.study.plan import plan_run, task_inputs

    config = load_file(RLRunConfig, known.file, known, overrides)
    check_engine(config.rl.rollout)
    out = output_directory(known)
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        **task_inputs(config.data_dir, {"rl": config.rl.task}),
    }
    run = plan_run("rl", config, label=f"rl {out.name}", directory=out, inputs=inputs)
    return make_alone([run], known)
