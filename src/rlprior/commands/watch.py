"""`rlprior watch`: look at a run or a study while it is made, or after; Ctrl-C ends the looking alone."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

SUMMARY = "look at a run or a study while it is made, or after; Ctrl-C ends the looking alone"
EXAMPLES = [
    "rlprior watch runs/ce",
    "rlprior watch runs/demo --once",
]
HAS_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument("directory", type=Path, metavar="RUN_OR_STUDY", help="the folder that --out named")
    parser.add_argument(
        "--once", action="store_true", help="print what there is and stop, as where the output is no terminal"
    )


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Show a run or a study."""
    from rlprior.reports.watch_view import watch

    with contextlib.suppress(KeyboardInterrupt):
        watch(known.directory, is_once=known.once)
    return 0
