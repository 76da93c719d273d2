"""`rlprior crosscheck`: an evaluation's stored GSM8K and MMLU samples, scored by lm-evaluation-harness, and why what differs does."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "an evaluation's stored GSM8K and MMLU samples, scored by lm-evaluation-harness, and why what differs does"
EXAMPLES = [
    "rlprior crosscheck runs/ce-eval --data-dir data",
]
HAS_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument(
        "directory", type=Path, metavar="RUN", help="folder that 'rlprior evaluate --suite' wrote"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder of the benchmarks' files, from which gold answers are read anew (default: the hub)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="every response that differs (default: RUN/crosscheck.json)",
    )


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Score the samples of an evaluation with lm-evaluation-harness."""
    from rlprior.evaluation.crosscheck import crosscheck, describe_crosscheck
    from rlprior.runs.files import write_json

    report = crosscheck(known.directory, known.data_dir)
    path = known.out or known.directory / "crosscheck.json"
    write_json(path, report)
    print(f"{describe_crosscheck(report)}\nevery response that differs: {path}")
    return 0
