"""`rlprior compare`: whether two evaluations of the same questions differ by more than chance, benchmark by benchmark."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "whether two evaluations of the same questions differ by more than chance, benchmark by benchmark"
EXAMPLES = [
    "rlprior compare runs/ce-eval runs/sharp-eval",
    "rlprior compare runs/ce-eval runs/sharp-eval --metric pass@8 --out runs/ce-sharp.json",
]
HAS_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    for name, label in (("first", "A"), ("second", "B")):
        parser.add_argument(name, type=Path, metavar=label, help="a folder that `rlprior evaluate` wrote")
    parser.add_argument(
        "--metric",
        default="avg",
        metavar="avg|pass@K|cons",
        help="share of correct samples (default), Pass@K, or majority votes",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every number there too")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Two evaluations, question by question."""
    from rlprior.evaluation.compare import (
        Metric,
        as_data,
        compare_evaluations,
        describe,
        read_evaluation,
    )
    from rlprior.runs.files import write_json

    metric = Metric.parse(known.metric)
    first, second = read_evaluation(known.first), read_evaluation(known.second)
    comparison = compare_evaluations(first, second, metric)
    print(f"A: {known.first}\nB: {known.second}\n\n{describe(comparison)}")
    if known.out:
        known.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(known.out, {"a": str(known.first), "b": str(known.second), **as_data(comparison)})
        print(f"\nwritten: {known.out}")
    return 0
