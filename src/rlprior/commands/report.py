"""`rlprior report`: write report.html of a study, finished or not."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write report.html of a study, finished or not"
EXAMPLES = [
    "rlprior report runs/demo",
]
HAS_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument("directory", type=Path, metavar="STUDY", help="a study's folder")
    parser.add_argument("--out", type=Path, help="the page to write (default: STUDY/report.html)")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Write the report of a study."""
    from rlprior.reports.study import write_report

    print(f"report: {write_report(known.directory, known.out or known.directory / 'report.html')}")
    return 0
