"""`rlprior watch`: a run or a study as a picture on the terminal that is drawn anew each second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlprior.reports.watch import WatchedRun, WatchedStudy, describe_count, open_run_or_study
from rlprior.study.estimate import format_seconds
from rlprior.tracking import flatten

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40
MAX_SHOWN = 8
"""Runs of a study that are shown one by one, of those in progress and of those that stopped."""
STARTING_SECONDS = 60.0
"""What the processes of a study may take from its first sign to the lock of their first run."""
WORTH_TELLING_SECONDS = 10.0
STYLES = {"running": "cyan", "done": "green", "stopped": "yellow", "waiting": "dim"}


def watch(directory: Path, *, is_once: bool) -> None:
    """Show the run or study in `directory` until it is done; once where that is asked for or nobody looks.

    Raises:
        UsageError: there is neither.
    """
    console = Console(highlight=False)
    watched = open_run_or_study(directory)
    if is_once or not console.is_terminal:
        console.print(draw(watched))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(draw(watched), refresh=True)
            if is_done(watched):
                return
            time.sleep(1)
            watched.update()


def is_done(watched: WatchedRun | WatchedStudy) -> bool:
    """Whether there is nothing left to wait for."""
    return watched.is_done if isinstance(watched, WatchedStudy) else watched.status == "done"


def draw(watched: WatchedRun | WatchedStudy) -> RenderableType:
    """One picture."""
    return _draw_study(watched) if isinstance(watched, WatchedStudy) else _draw_run(watched)


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """A curve in one line of at most `width` characters: means of equal stretches, from the lowest to the highest.

    >>> sparkline([1, 2, 3, 4]), sparkline([5, 5]), sparkline([])
    ('▁▃▆█', '▁▁', '')
    """
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)] if width else []
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    lowest, span = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(top * (mean - lowest) / span) if span else 0] for mean in means)


# A run


def _draw_run(run: WatchedRun) -> RenderableType:
    name = run.label if run.label.startswith(run.stage) else f"{run.stage} {run.label}"
    lines: list[RenderableType] = [_title(name, run.status)]
    if run.progress:
        share = f" {run.share:.0%}"
        lines.append(Columns([_bar(run.share, 1.0, width=40), share]))
    lines.append(Text(_describe_pace(run)))
    curve = run.metrics
    if curve.values:
        lines += [
            Text(),
            Text(f"{curve.curve}, steps {curve.steps[0]} to {curve.steps[-1]}", style="bold"),
            Text(f"{curve.values[0]:.4g} {sparkline(curve.values)} {curve.values[-1]:.4g}"),
        ]
    if curve.last:
        lines += [Text(), Text(f"step {curve.last['step']}", style="bold"), _last_values(run)]
        documents = {"rl": "docs/rl.md", "sft": "docs/posttraining.md", "dpo": "docs/posttraining.md"}
        document = documents.get(run.stage, "docs/training.md")
        lines.append(
            Text(f"{document} says what each name means; all steps are in {curve.path}", style="dim")
        )
    if run.warning:
        advice = "; the same command goes on from the last checkpoint" if run.status == "stopped" else ""
        lines += [Text(), _warning(run.warning + advice)]
    return Group(*lines)


def _title(name: str, status: str) -> Text:
    words = {"stopped": "not running"}
    return Text.assemble((name, "bold"), "  ", (words.get(status, status), STYLES[status]))


def _describe_pace(run: WatchedRun) -> str:
    """Count, rate, time left, and when it last moved."""
    progress = run.progress
    if progress is None:
        return {"waiting": "not begun", "running": "starting"}.get(run.status, "")
    parts = [describe_count(progress), progress.note]
    if run.status == "running":
        if progress.rate:
            parts.append(_describe_rate(progress.rate, progress.unit))
        if run.seconds_left is not None:
            parts.append(f"{format_seconds(run.seconds_left)} left")
        if run.silence_seconds > WORTH_TELLING_SECONDS:
            parts.append(f"last news {format_seconds(run.silence_seconds)} ago")
    return ", ".join(part for part in parts if part)


def _describe_rate(rate: float, unit: str) -> str:
    """
    >>> _describe_rate(12.3456, "steps"), _describe_rate(0.25, "steps")
    ('12.3 steps/s', '4.0 s a step')
    """
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s a {unit.removesuffix('s')}"


def _last_values(run: WatchedRun) -> Table:
    """Numbers of the last record, two to a line."""
    record = {**run.metrics.last, **run.timing.last}
    cells = [
        (name, _format(value))
        for name, value in flatten(record, separator="/")
        if isinstance(value, int | float) and name != "step"
    ]
    table = Table.grid(padding=(0, 2))
    half = (len(cells) + 1) // 2
    for left, right in zip(cells[:half], [*cells[half:], ("", "")], strict=False):
        table.add_row(
            Text(left[0]), Text(left[1], justify="right"), Text(right[0]), Text(right[1], justify="right")
        )
    return table


def _format(value: float) -> str:
    """
    >>> _format(12345), _format(0.000123456), _format(8123.4)
    ('12,345', '0.0001235', '8,123')
    """
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


# A study


def _draw_study(study: WatchedStudy) -> RenderableType:
    running, stopped = study.with_status("running"), study.with_status("stopped")
    status = "done" if study.is_done else "running" if running else "stopped"
    lines: list[RenderableType] = [_title(study.name, status), _stages(study)]
    if study.seconds_left is not None:
        lines.append(Text(f"about {format_seconds(study.seconds_left)} left"))
    elif running:
        lines.append(Text("time left: known once a run of each stage is done"))
    for run in running[:MAX_SHOWN]:
        lines += [Text(), Text(run.label, style="bold"), Text(f"  {_describe_pace(run)}")]
        if run.metrics.values:
            values = run.metrics.values
            curve = f"  {run.metrics.curve} {values[0]:.4g} {sparkline(values)} {values[-1]:.4g}"
            lines.append(Text(curve))
    lines += _more(running)
    warnings = [f"{run.label}: {run.warning}" for run in (*running, *stopped) if run.warning]
    if status == "stopped" and study.silence_seconds < STARTING_SECONDS:
        lines.append(
            Text("no run is open right now: it is starting, between two runs, or has just been stopped")
        )
    elif status == "stopped":
        warnings = [f"no run is being made; the same command goes on: {study.command}", *warnings]
    lines += [Text(), *map(_warning, warnings[:MAX_SHOWN])] if warnings else []
    if study.is_done:
        report = study.directory / "report.html"
        how = str(report) if report.exists() else f"not written yet; rlprior report {study.directory}"
        lines.append(Text(f"report: {how}"))
    return Group(*lines)


def _stages(study: WatchedStudy) -> Table:
    """A line a stage: how many of its runs are done."""
    table = Table.grid(padding=(0, 2))
    for stage in dict.fromkeys(run.stage for run in study.runs):
        runs = [run for run in study.runs if run.stage == stage]
        num_done = sum(run.status == "done" for run in runs)
        bar = _bar(sum(run.share for run in runs), len(runs), width=24)
        table.add_row(stage, bar, f"{num_done} of {len(runs)} runs done")
    return table


def _bar(done: float, total: float, *, width: int) -> ProgressBar:
    # not the library's red, which looks like an alarm
    return ProgressBar(
        completed=done, total=total, width=width, complete_style="cyan", finished_style="green"
    )


def _more(runs: Sequence[WatchedRun]) -> list[RenderableType]:
    return [Text(f"and {len(runs) - MAX_SHOWN} more")] if len(runs) > MAX_SHOWN else []


def _warning(text: str) -> Text:
    return Text.assemble(("! ", "bold yellow"), (text, "yellow"))
