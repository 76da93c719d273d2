"""`rlprior study`: pre-train, mid-train, RL-train and evaluate several objectives, and write the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlprior.commands.options import (
    add_out,
    add_seeds_and_workers,
    add_track,
    load_file,
    output_directory,
    show_plan,
)
from rlprior.config import UsageError

if TYPE_CHECKING:
    from rlprior.study.plan import PlannedRun

SUMMARY = "pre-train, mid-train, RL-train and evaluate several objectives, and write the report"
EXAMPLES = [
    "rlprior study study.toml",
    "rlprior study study.toml --dry-run",
    "rlprior study study.toml --data-dir data --workers 2",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="the study's settings")
    add_seeds_and_workers(parser)
    add_track(parser)
    add_out(parser)


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Arms x seeds, and the report."""
    from rlprior.reports.study import write_report
    from rlprior.study.config import StudyConfig
    from rlprior.study.plan import plan_study
    from rlprior.study.runner import write_study_file

    if known.workers < 1 or known.threads < 1:
        raise UsageError("--workers and --threads must be at least 1")
    config = load_file(StudyConfig, known.file, known, overrides)
    directory = output_directory(known)
    plan = plan_study(config, directory)
    if show_plan(plan, known, num_workers=known.workers):
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    command = "rlprior " + " ".join(sys.argv[1:])
    write_study_file(config, directory, plan, command=command)
    _execute(plan, known)
    write_study_file(config, directory, plan, command=command)
    report = write_report(directory, directory / "report.html")
    _print_stage_times(plan)
    print(f"report: {report}")
    return 0


def _execute(plan: Sequence[PlannedRun], known: argparse.Namespace) -> None:
    from rlprior.reports.progress import StudyDisplay
    from rlprior.study.runner import execute_plan

    with StudyDisplay(plan) as display:
        execute_plan(
            plan,
            num_workers=known.workers,
            threads_per_worker=known.threads,
            on_change=display.update,
            on_finish=display.finish,
            track=known.track,
        )


def _print_stage_times(plan: Sequence[PlannedRun]) -> None:
    from rlprior.study.runner import stage_seconds

    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in stage_seconds(plan).items())
    print(f"processor time by stage, all arms: {times}")
