"""`rlprior dpo`: direct preference optimization on correct against wrong answers, from a Hugging Face folder."""

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

SUMMARY = "direct preference optimization on correct against wrong answers, from a Hugging Face folder"
EXAMPLES = [
    "rlprior dpo dpo.toml --init-from runs/ce-sft/checkpoints/step-00000100 --out runs/ce-dpo",
    "rlprior dpo dpo.toml --init-from MODEL --samples runs/scores/samples/gsm8k-00000000.jsonl",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument(
        "file", type=Path, metavar="FILE.toml", help="DPO settings and where its examples come from"
    )
    parser.add_argument(
        "--samples", metavar="FILE", help="graded samples of an evaluation (default: the run draws its own)"
    )
    add_init_from(parser)
    add_track(parser)
    add_out(parser)


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Direct preference optimization."""
    from rlprior.posttraining import require_trl
    from rlprior.posttraining.dpo import DPORunConfig, describe_pairs
    from rlprior.runs.identity import input_identity
    from rlprior.sampling.grades import grades_of
    from rlprior.study.plan import plan_run, task_inputs

    require_trl("dpo")
    config = load_file(DPORunConfig, known.file, known, overrides)
    out = output_directory(known)
    store = Path(config.samples) if config.samples else None
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        "samples": input_identity(store) if store else "",
        "grades": input_identity(grades_of(store)) if store else "",
        **task_inputs(config.data_dir, {"dpo": config.dpo.task}),
    }
    run = plan_run("dpo", config, label=f"dpo {out.name}", directory=out, inputs=inputs)
    code = make_alone([run], known)
    if not known.dry_run:
        print(describe_pairs(out))
    return code
