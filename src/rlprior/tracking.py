"""Trackers: where a run's metrics go besides its own files, for those who look at runs in TensorBoard, W&B, MLflow or trackio.

The files of the run are the truth. A tracker holds a copy of the numbers, takes no part in what names a run, and one that fails is left
behind with a warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlprior.config import UsageError

PROJECT = "rlprior"
"""Project (MLflow: experiment) of all runs, unless the tracker's own environment variable names another."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run.

    Args:
        id: the run's identity: the same run gone on with is the same run in the tracker.
        directory: the run's folder.
        config: plain data of what determines the run.
        first_step: step that this process begins with; earlier ones have been made before.
    """

    id: str
    directory: Path
    config: Mapping[str, Any]
    first_step: int

    @property
    def name(self) -> str:
        """The folder's name, with the id in it, so that no two runs share one.

        >>> TrackedRun(id="c0ffee", directory=Path("runs/ce"), config={}, first_step=1).name
        'ce-c0ffee'
        """
        name = self.directory.name
        return name if self.id in name else f"{name}-{self.id}"


class Tracker(Protocol):
    """One place that metrics are sent to. Any method may raise: the run goes on without it."""

    def open(self, run: TrackedRun) -> int:
        """Start, or go on with, the tracker's own run. Returns the last step that it holds already, or less than 1."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of one step; steps come in order, each once."""
        ...

    def close(self, *, is_finished: bool) -> None:
        """Send what is left; `is_finished` unless the run was stopped or failed."""
        ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def open(self, run: TrackedRun) -> int:
        """Later steps of an earlier process are struck out by `purge_step`."""
        from torch.utils.tensorboard import SummaryWriter

        directory = run.directory / "tensorboard"
        has_events = any(directory.glob("events.*"))
        self._writer = SummaryWriter(str(directory), purge_step=run.first_step)
        return run.first_step - 1 if has_events else 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """On disk at once: what a kill loses here would never be sent again."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, is_finished: bool) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, its id that of ours. Account, mode, entity and project come from wandb's own settings."""

    def open(self, run: TrackedRun) -> int:
        """Resumes the run of that id if there is one."""
        wandb = importlib.import_module("wandb")
        # a login prompt or a dead network must not hold the training up for long
        settings = wandb.Settings(console="off", quiet=True, init_timeout=60, login_timeout=60)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            dir=str(run.directory),
            config=dict(run.config),
            resume="allow",
            settings=settings,
        )
        return self._run.step - 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queued; wandb sends it from a process of its own."""
        self._run.log(dict(values), step=step)

    def close(self, *, is_finished: bool) -> None:
        """Wait for the queue."""
        self._run.finish(exit_code=0 if is_finished else 1)


class MLflow:
    """A run of MLflow that carries the run's id as a tag. `MLFLOW_TRACKING_URI` says where."""

    TAG = "rlprior.id"
    MAX_PARAMS_PER_CALL = 100

    def open(self, run: TrackedRun) -> int:
        """Goes on with the run of that tag if there is one."""
        # the library's own 7 tries of 120 seconds would hold the training up while a server is down
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        mlflow = importlib.import_module("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._client: Any = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        found = self._client.search_runs([experiment.experiment_id], f"tags.`{self.TAG}` = '{run.id}'")
        if not found:
            new = self._client.create_run(
                experiment.experiment_id, tags={self.TAG: run.id}, run_name=run.name
            )
            self._run_id = new.info.run_id
            self._log_config(run.config)
            return 0
        self._run_id = found[0].info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        return max(
            (
                metric.step
                for name in found[0].data.metrics
                for metric in self._client.get_metric_history(self._run_id, name)
            ),
            default=0,
        )

    def _log_config(self, config: Mapping[str, Any]) -> None:
        params = [
            self._entities.Param(name, value if isinstance(value, str) else json.dumps(value))
            for name, value in flatten(config, separator=".")
        ]
        for start in range(0, len(params), self.MAX_PARAMS_PER_CALL):
            self._client.log_batch(self._run_id, params=params[start : start + self.MAX_PARAMS_PER_CALL])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One request."""
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, *, is_finished: bool) -> None:
        """Set the status."""
        self._client.set_terminated(self._run_id, "FINISHED" if is_finished else "KILLED")


class Trackio:
    """A run of trackio: local, unless its own environment variables name a Space or a server."""

    def open(self, run: TrackedRun) -> int:
        """Resumes the run of that name, which has the id in it, if there is one."""
        trackio = importlib.import_module("trackio")
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.name,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        # no public name: without it a resumed run would hold its last steps twice
        return self._run._next_step - 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queued; a thread of trackio's sends it."""
        self._run.log(dict(values), step=step)

    def close(self, *, is_finished: bool) -> None:
        """Wait for the queue."""
        self._run.finish()


TRACKERS: dict[str, tuple[Callable[[], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"),
}
"""What `--track` takes -> the tracker, and its package, of the same name in Python and on PyPI."""


def require_packages(names: Iterable[str]) -> None:
    """Check that the packages of trackers are installed, without importing them.

    Raises:
        UsageError: the first that is not, with the command that installs it.
    """
    for name in names:
        package = TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"--track {name}: the package {package} is not installed; pip install {package}, or leave {name} out"
            )


class Trackers:
    """The chosen trackers of one run. No failure of theirs reaches the run: each is told in one line, once."""

    def __init__(self, names: Sequence[str]) -> None:
        """Nothing is imported or opened yet.

        Args:
            names: keys of `TRACKERS`.
        """
        self._names = tuple(dict.fromkeys(names))
        self._open: dict[str, Tracker] = {}

    def open(self, run: TrackedRun, records: Sequence[Mapping[str, Any]]) -> None:
        """Open all, and send each what it lacks of the steps before.

        Args:
            records: what has been logged before `run.first_step`, timing included.
        """
        self._last_step: dict[str, int] = {}
        for name in self._names:
            tracker = TRACKERS[name][0]()
            self._open[name] = tracker

            def open_one(name: str = name, tracker: Tracker = tracker) -> None:
                self._last_step[name] = tracker.open(run)

            self._attempt(name, open_one)
        for record in records:
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record, which has a `step`; lists stay in the run's own files."""
        step = record["step"]
        values = {
            name: value
            for name, value in flatten(record, separator="/")
            if isinstance(value, int | float) and name != "step"
        }
        for name, tracker in list(self._open.items()):
            # a step that was made before and is made again is the same step
            if step > self._last_step[name]:
                self._attempt(name, lambda tracker=tracker: tracker.log(step, values))
                self._last_step[name] = step

    def close(self, *, is_finished: bool) -> None:
        """Close what is still open."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: tracker.close(is_finished=is_finished))
        self._open.clear()

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            reason = next(iter(str(error).splitlines()), "").rstrip(".") or type(error).__name__
            # not warnings.warn: under -W error that would end the run
            print(
                f"rlprior: warning: {name}: {reason}; the run goes on without {name}, its own files are complete",
                file=sys.stderr,
            )


def flatten(table: Mapping[str, Any], *, separator: str, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Entries of nested tables by their path.

    >>> list(flatten({"a": 1, "b": {"c": 2}}, separator="/"))
    [('a', 1), ('b/c', 2)]
    """
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, separator=separator, prefix=f"{prefix}{name}{separator}")
        else:
            yield f"{prefix}{name}", value
