"""`rlprior samples`: read a run's questions, responses and verdicts in one HTML page, tokens coloured by what a model says of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlprior.config import UsageError

if TYPE_CHECKING:
    from rlprior.reports.samples import Page

SUMMARY = "read a run's questions, responses and verdicts in one HTML page, tokens coloured by what a model says of them"
EXAMPLES = [
    "rlprior samples runs/ce-eval",
    "rlprior samples runs/ce-eval --model runs/ce/checkpoints/step-00000400",
    "rlprior samples runs/rl-eval --model runs/rl/checkpoints/step-00000100 --against runs/ce/checkpoints/step-00000400",
    "rlprior samples runs/ce-eval --task gsm8k --max-questions 500 --out gsm8k.html --parquet gsm8k.parquet",
]
HAS_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument(
        "directory", type=Path, metavar="RUN", help="the folder of an evaluation, or of any run with samples/"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="a Hugging Face folder that says how probable each token is",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="another with the same tokenizer, to show the difference",
    )
    parser.add_argument("--task", nargs="+", default=(), metavar="NAME", help="these tasks alone")
    parser.add_argument(
        "--max-questions", type=int, default=100, metavar="N", help="of each task and step (default: 100)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="the page to write (default: RUN/samples.html)"
    )
    parser.add_argument(
        "--parquet", type=Path, metavar="FILE", help="also all samples as a table, a row each"
    )


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Write the page of a run's samples, and their table."""
    from rlprior.reports.samples import collect, write_page
    from rlprior.sampling.pools import find_stores, read_pool, write_parquet

    if known.max_questions < 1:
        raise UsageError("--max-questions must be at least 1")
    if known.against and not known.model:
        raise UsageError("--against needs --model: the difference is of the two")
    pools = [read_pool(path) for path in find_stores(known.directory, known.task)]
    if known.parquet:
        print(f"table: {known.parquet} ({write_parquet(pools, known.parquet):,} samples)")
    page = collect(pools, known.max_questions)
    if known.model:
        _color(page, known)
    out = known.out or known.directory / "samples.html"
    write_page(page, pools, out, title=known.directory.resolve().name)
    print(f"page: {out} ({page.num_samples:,} samples of {len(page.cards):,} questions)")
    return 0


def _color(page: Page, known: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from rlprior.reports.coloring import color_tokens

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("reading the models", total=None)
        color_tokens(
            page,
            known.model,
            known.against,
            lambda what, done, total: bars.update(bar, description=what, completed=done, total=total),
        )
