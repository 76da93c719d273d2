"""What several commands share: their options, their files, and how their runs are made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlprior.config import UsageError

if TYPE_CHECKING:
    from rlprior.study.plan import PlannedRun


def add_init_from(parser: argparse.ArgumentParser) -> None:
    """`--init-from`."""
    parser.add_argument("--init-from", metavar="MODEL", help="Hugging Face folder to start from")


def add_seeds_and_workers(parser: argparse.ArgumentParser) -> None:
    """Options of studies."""
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="replaces the file's seeds")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes at a time (default: 2)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each (default: 1)")


def add_track(parser: argparse.ArgumentParser) -> None:
    """`--track`."""
    from rlprior.tracking import TRACKERS

    parser.add_argument(
        "--track",
        nargs="+",
        default=(),
        choices=tuple(TRACKERS),
        metavar="NAME",
        help=f"send the metrics elsewhere too: {', '.join(TRACKERS)}",
    )


def add_out(parser: argparse.ArgumentParser, *, default: str = "runs/FILE") -> None:
    """Options of commands that make runs."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of all outputs (default: {default})")
    parser.add_argument("--data-dir", metavar="DIR", help="folder that relative paths of data start from")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what it costs, and stop")


def at_least_one(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def load_file(config_type: Any, path: Path, known: argparse.Namespace, overrides: list[str]) -> Any:
    """The settings of a file, with what the command line replaces."""
    from rlprior.config import load_config

    extra = list(overrides)
    if getattr(known, "init_from", None):
        extra.append(f"init_from={Path(known.init_from).resolve()}")
    if getattr(known, "samples", None):
        extra.append(f"samples={Path(known.samples).resolve()}")
    if known.data_dir:
        extra.append(f"data_dir={Path(known.data_dir).resolve()}")
    if getattr(known, "seeds", None):
        extra.append(f"seeds={known.seeds}")
    return load_config(config_type, path, extra)


def output_directory(known: argparse.Namespace) -> Path:
    """Where the outputs go."""
    return (known.out or Path("runs") / known.file.stem).resolve()


def make_alone(plan: list[PlannedRun], known: argparse.Namespace) -> int:
    """Make runs one after the other, in this process or in those that torchrun started."""
    from rlprior.reports.progress import show_alone
    from rlprior.study.plan import DISTRIBUTED_STAGES
    from rlprior.world import join_world

    with join_world() as world:
        if world.size > 1 and plan[-1].stage not in DISTRIBUTED_STAGES:
            raise UsageError(f"'rlprior {known.command}' runs in one process; start it without torchrun")
        if (world.is_main and show_plan(plan, known, num_workers=1)) or known.dry_run:
            return 0
        for planned in plan:
            show_alone(planned, world, getattr(known, "track", ()))
        if world.is_main:
            print(f"outputs: {plan[-1].directory}")
    return 0


def show_plan(plan: Sequence[PlannedRun], known: argparse.Namespace, *, num_workers: int) -> bool:
    """Print what there is to do; True where that is all (`--dry-run`)."""
    from rlprior.study.estimate import describe_plan

    print(describe_plan(plan, num_workers=num_workers, is_dry_run=known.dry_run))
    return known.dry_run
