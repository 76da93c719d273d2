"""What a person sees while runs are made: bars on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from rlprior.runs.folder import Progress, read_progress
from rlprior.study.estimate import format_seconds
from rlprior.study.plan import PlannedRun
from rlprior.study.runner import execute
from rlprior.world import World

LOG_EVERY_SECONDS = 60


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def describe(progress: Progress) -> str:
    """Count, what the stage says, and the time left."""
    left = (
        f", {format_seconds((progress.total - progress.done) / progress.rate)} left" if progress.rate else ""
    )
    return f"{progress.done}/{progress.total} {progress.unit}, {progress.note}{left}"


class StudyDisplay:
    """Bars for the runs in progress and for the whole, or a line a finished run where there is no terminal."""

    def __init__(self, plan: Sequence[PlannedRun]) -> None:
        self.console = Console()
        self.bars = _bars(self.console)
        self.tasks: dict[str, TaskID] = {}
        # runs without a cost (data) count a little, so that the bar moves
        self.cost = {run.label: run.cost or 1.0 for run in plan}
        self.todo = [run.label for run in plan if not run.is_done]
        self.num_finished = 0
        self.started = self.last_line = time.monotonic()
        self.finished_cost = 0.0

    def __enter__(self) -> StudyDisplay:
        if self.console.is_terminal:
            self.bars.start()
            self.whole = self.bars.add_task(
                "whole study", total=sum(self.cost[label] for label in self.todo), note=""
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def finish(self, run: PlannedRun) -> None:
        """Note that a run is finished."""
        self.num_finished += 1
        self.finished_cost += self.cost[run.label]
        self.console.print(
            f"\\[{format_seconds(time.monotonic() - self.started)}] {self.num_finished}/{len(self.todo)} {run.label} done",
            highlight=False,
        )
        if run.label in self.tasks:
            self.bars.remove_task(self.tasks.pop(run.label))

    def update(self, running: Sequence[PlannedRun], pending: Sequence[PlannedRun]) -> None:
        """Show how far the runs in progress are."""
        done = self.finished_cost
        lines: list[str] = []
        for run in running:
            progress = read_progress(run.directory)
            if progress is None:
                continue
            done += self.cost[run.label] * progress.done / max(1, progress.total)
            lines.append(f"{run.label}: {describe(progress)}")
            if self.console.is_terminal:
                if run.label not in self.tasks:
                    self.tasks[run.label] = self.bars.add_task(run.label, total=progress.total, note="")
                note = describe(progress)
                self.bars.update(
                    self.tasks[run.label], completed=progress.done, total=progress.total, note=note
                )
        elapsed = time.monotonic() - self.started
        total = sum(self.cost[label] for label in self.todo)
        left = f"about {format_seconds(elapsed * (total - done) / done)} left" if done else ""
        if self.console.is_terminal:
            self.bars.update(
                self.whole, completed=done, note=f"{self.num_finished}/{len(self.todo)} runs, {left}"
            )
        elif time.monotonic() - self.last_line > LOG_EVERY_SECONDS and lines:
            self.last_line = time.monotonic()
            self.console.print(f"\\[{format_seconds(elapsed)}] " + "; ".join([*lines, left]), highlight=False)


def show_alone(run: PlannedRun, world: World, track: Sequence[str]) -> None:
    """Make one run in the world's processes, the first of which shows a bar or a line every minute."""
    console = Console(quiet=not world.is_main)
    if run.is_done:
        execute(run, world=world)
        console.print(f"{run.label}: done already", highlight=False)
        return
    with _bars(console) as bars:
        task = bars.add_task(run.label, total=None, note="")
        last_line = time.monotonic()

        def show(progress: Progress) -> None:
            nonlocal last_line
            bars.update(task, completed=progress.done, total=progress.total, note=describe(progress))
            if not console.is_terminal and time.monotonic() - last_line > LOG_EVERY_SECONDS:
                last_line = time.monotonic()
                console.print(f"{run.label}: {describe(progress)}", highlight=False)

        execute(run, show, world, track)
    console.print(f"{run.label}: done", highlight=False)
