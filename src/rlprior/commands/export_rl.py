"""`rlprior export-rl`: the same reinforcement learning for a distributed engine: model, prompts, reward and configuration in one folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlprior.commands.options import add_init_from, load_file

SUMMARY = "the same reinforcement learning for a distributed engine: model, prompts, reward and configuration in one folder"
EXAMPLES = [
    "rlprior export-rl rl.toml --init-from runs/ce/checkpoints/step-00000400 --engine verl --out verl-run",
    "rlprior export-rl rl.toml --init-from MODEL --out verl-run --validation-file test.jsonl",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="settings of `rlprior rl`")
    parser.add_argument(
        "--engine", choices=("verl",), default="verl", help="verl 0.9, the only one (default)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--data-dir", metavar="DIR", help="folder that relative paths of data start from")
    parser.add_argument(
        "--validation-problems", type=int, default=128, metavar="N", help="held-out problems (default: 128)"
    )
    parser.add_argument(
        "--validation-file",
        type=Path,
        metavar="FILE.jsonl",
        help="take them from here; a task of kind 'file' needs it",
    )
    add_init_from(parser)


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """The same for another engine."""
    from rlprior.rl.loop import RLRunConfig
    from rlprior.rl.verl.export import HeldOut, export_to_verl

    config = load_file(RLRunConfig, known.file, known, overrides)
    held_out = HeldOut(num_problems=known.validation_problems, path=known.validation_file)
    export = export_to_verl(config, known.out.resolve(), held_out=held_out, source=known.file.name)
    for caution in export.cautions:
        print(f"rlprior: warning: {caution}", file=sys.stderr)
    print(f"{export.summary}\nhow to run it and what differs: {export.directory / 'README.md'}")
    return 0
