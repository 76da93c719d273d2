"""Execute a plan: only what is missing, several processes, safe to kill and start again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError, encode
from rlprior.processes import Pool, open_pool
from rlprior.runs.files import write_json
from rlprior.runs.folder import Progress, Run, session_seconds
from rlprior.runs.provenance import hardware, provenance
from rlprior.runs.signals import RunStopped
from rlprior.study.config import StudyConfig
from rlprior.study.plan import DISTRIBUTED_STAGES, STAGES, PlannedRun, describe_model
from rlprior.tracking import Trackers
from rlprior.world import ALONE, World


def execute(
    planned: PlannedRun,
    on_progress: Callable[[Progress], None] | None = None,
    world: World = ALONE,
    track: Sequence[str] = (),
) -> Path:
    """Make one run in this process and the others of the world, or go on with it; does nothing where it is done.

    Args:
        planned: the run.
        on_progress: told how far it is.
        world: the processes that share it.
        track: names of the trackers that its metrics are sent to.

    Returns:
        Its directory.
    """
    if planned.stage not in DISTRIBUTED_STAGES:
        # by the file and not in a collective call, which gives up after some minutes
        while not (world.is_main or planned.is_done):
            time.sleep(0.5)
        world = ALONE
    if not world.on_main(lambda: planned.is_done):
        with Run(
            planned.directory,
            planned.identity,
            planned.config,
            world=world,
            on_progress=on_progress,
            trackers=Trackers(track),
        ) as run:
            STAGES[planned.stage].run(planned.config, run)
    return planned.directory


def execute_plan(
    plan: Sequence[PlannedRun],
    *,
    num_workers: int,
    threads_per_worker: int,
    on_change: Callable[[Sequence[PlannedRun], Sequence[PlannedRun]], None],
    on_finish: Callable[[PlannedRun], None],
    track: Sequence[str] = (),
) -> None:
    """Make every missing run, the ones on the longest way to the end first.

    Args:
        plan: runs, each after those it needs.
        num_workers: processes. On few cores, two processes of one thread beat one process of two.
        threads_per_worker: torch threads of each; the same number gives the same bytes.
        on_change: called about twice a second with the runs in progress and those that wait.
        on_finish: called once for each run that finishes.
        track: names of the trackers that the runs' metrics are sent to.

    Raises:
        RunError, UsageError: of the first run that failed, after the runs that do not need it are finished.
    """
    pending = [planned for planned in plan if not planned.is_done]
    urgency = _remaining_cost(plan)
    pending.sort(key=lambda planned: -urgency[planned.directory])
    running: dict[Future[Path], PlannedRun] = {}
    failures: list[tuple[PlannedRun, BaseException]] = []
    make = partial(_execute_in_worker, track=track)
    try:
        with open_pool(num_workers, threads_per_worker) as pool:
            while pending or running:
                _submit_ready(plan, pending, running, pool, num_workers, make)
                if not running:
                    break  # what is left needs a run that failed
                for future in pool.wait(running):
                    planned, error = running.pop(future), future.exception()
                    if error is None:
                        on_finish(planned)
                    else:
                        failures.append((planned, error))
                on_change(list(running.values()), pending)
    except BrokenProcessPool:
        labels = " or ".join(planned.label for planned in running.values()) or "a worker"
        raise RunError(
            f"{labels}: the process was killed, perhaps for want of memory; run the same command again to go on"
        ) from None
    if failures:
        raise _as_one_line(*failures[0], num_failed=len(failures), num_left=len(pending))


def _execute_in_worker(planned: PlannedRun, track: Sequence[str]) -> Path:
    """`execute`, but a process that SIGTERM has stopped ends: the pool would give it the next run, which no signal would stop."""
    try:
        return execute(planned, track=track)
    except RunStopped:
        os._exit(0)


def _submit_ready(
    plan: Sequence[PlannedRun],
    pending: list[PlannedRun],
    running: dict[Future[Path], PlannedRun],
    pool: Pool,
    num_workers: int,
    make: Callable[[PlannedRun], Path],
) -> None:
    finished = {planned.directory for planned in plan if planned.is_done}
    ready = [planned for planned in pending if finished.issuperset(planned.needs)]
    for planned in ready[: num_workers - len(running)]:
        running[pool.submit(make, planned)] = planned
        pending.remove(planned)


def _as_one_line(planned: PlannedRun, error: BaseException, *, num_failed: int, num_left: int) -> Exception:
    rest = f" ({num_failed} failed, {num_left} not made)" if num_failed > 1 or num_left else ""
    if isinstance(error, UsageError | RunError):
        return type(error)(f"{planned.label}: {error}{rest}")
    return error if isinstance(error, Exception) else RunError(f"{planned.label}: {error!r}{rest}")


def _remaining_cost(plan: Sequence[PlannedRun]) -> dict[Path, float]:
    """Cost of each run and of the costliest chain of runs that waits for it."""
    cost = {planned.directory: planned.cost for planned in plan}
    for planned in reversed(plan):
        for needed in planned.needs:
            own = next(run.cost for run in plan if run.directory == needed)
            cost[needed] = max(cost[needed], own + cost[planned.directory])
    return cost


def write_study_file(
    config: StudyConfig,
    directory: Path,
    plan: Sequence[PlannedRun],
    *,
    command: str,
    notes: Iterable[str] = (),
) -> None:
    """Write `study.json`: what the report reads, with paths relative to the study's folder."""
    evaluations = {run.needs[0]: run for run in plan if run.stage == "evaluate"}
    runs = [
        {
            "arm": run.arm,
            "seed": run.seed,
            "stage": run.stage,
            "directory": run.directory.relative_to(directory).as_posix(),
            "evaluation": evaluations[run.directory].directory.relative_to(directory).as_posix(),
        }
        for run in plan
        if run.directory in evaluations
    ]
    arms = [
        {"name": name, "label": arm.label, "objective": encode(arm.objective)}
        for name, arm in config.arms.items()
    ]
    study: dict[str, Any] = {
        "name": config.title,
        "arms": arms,
        "baseline": config.baseline,
        "seeds": list(config.seeds),
        "runs": runs,
        "model": describe_model(config),
        "config": encode(config),
        "hardware": hardware(),
        "versions": provenance()["versions"],
        "command": command,
        "wall_seconds": stage_seconds(plan),
        "notes": list(notes),
    }
    write_json(directory / "study.json", study)


def stage_seconds(plan: Sequence[PlannedRun]) -> dict[str, float]:
    """Seconds that all processes have spent on each stage, all arms and seeds together."""
    seconds: dict[str, float] = {}
    for run in plan:
        seconds[run.stage] = seconds.get(run.stage, 0.0) + session_seconds(run.directory)
    return seconds
