"""`rlprior train`: one language-model stage: pre-training, or mid-training with --init-from."""

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

SUMMARY = "one language-model stage: pre-training, or mid-training with --init-from"
EXAMPLES = [
    "rlprior train train.toml --out runs/ce",
    "torchrun --nproc-per-node 8 -m rlprior train train.toml --out runs/ce",
    "rlprior train train.toml --out runs/ce --track tensorboard wandb",
    "rlprior train train.toml --out runs/sharp --training.objective='{name=\"reward_shaping\", beta=-0.25}'",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="data, model and training settings")
    add_init_from(parser)
    add_track(parser)
    add_out(parser)


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """One language-model stage."""
    from rlprior.runs.identity import input_identity
    from rlprior.study.config import TrainFile
    from rlprior.study.plan import plan_data, plan_run
    from rlprior.training.language_model import LanguageModelConfig

    file = load_file(TrainFile, known.file, known, overrides)
    out = output_directory(known)
    data = plan_data(file.data, out.parent, file.data_dir)
    config = LanguageModelConfig(
        training=file.training,
        corpus=str(data.directory),
        seed=file.seed,
        model=file.model,
        init_from=file.init_from,
    )
    inputs = {
        "corpus": data.identity.id,
        "init_from": input_identity(Path(file.init_from)) if file.init_from else "",
    }
    stage = "midtrain" if file.init_from else "pretrain"
    run = plan_run(
        stage, config, label=f"{stage} {out.name}", directory=out, inputs=inputs, needs=(data.directory,)
    )
    return make_alone([data, run], known)
