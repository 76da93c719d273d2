"""`rlprior demo`: compare the paper's five objectives end to end on text that Python itself carries."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlprior.commands import study
from rlprior.commands.options import add_out, add_seeds_and_workers, add_track

SUMMARY = "compare the paper's five objectives end to end on text that Python itself carries"
EXAMPLES = [
    "rlprior demo",
    "rlprior demo --dry-run",
    "rlprior demo --seeds 0 1 2 3 4 --out runs/demo-5",
    "rlprior demo --rl.num_steps=20",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    add_seeds_and_workers(parser)
    add_track(parser)
    add_out(parser, default="runs/demo")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """The built-in study."""
    known.file = Path(__file__).parents[1] / "study" / "demo.toml"
    known.out = known.out or Path("runs/demo")
    return study.run(known, overrides)
