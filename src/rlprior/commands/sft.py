"""`rlprior sft`: supervised fine-tuning on worked solutions or a file of pairs, from a Hugging Face folder."""

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

SUMMARY = "supervised fine-tuning on worked solutions or a file of pairs, from a Hugging Face folder"
EXAMPLES = [
    "rlprior sft sft.toml --init-from runs/ce/checkpoints/step-00000400 --out runs/ce-sft",
    "rlprior sft sft.toml --init-from MODEL --sft.num_epochs=3 --sft.objective.name=dynamic_fine_tuning",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument(
        "file", type=Path, metavar="FILE.toml", help="SFT settings and where its examples come from"
    )
    add_init_from(parser)
    add_track(parser)
    add_out(parser)


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Supervised fine-tuning."""
    from rlprior.posttraining import require_trl
    from rlprior.posttraining.sft import SFTRunConfig
    from rlprior.runs.identity import input_identity
    from rlprior.study.plan import plan_run, task_inputs
    from rlprior.tasks.config import data_folder, resolve_path

    require_trl("sft")
    config = load_file(SFTRunConfig, known.file, known, overrides)
    out = output_directory(known)
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        **task_inputs(config.data_dir, {"sft": config.sft.task} if config.sft.task else {}),
    }
    if config.sft.path:
        inputs["file"] = input_identity(resolve_path(config.sft.path, data_folder(config.data_dir)))
    run = plan_run("sft", config, label=f"sft {out.name}", directory=out, inputs=inputs)
    return make_alone([run], known)
