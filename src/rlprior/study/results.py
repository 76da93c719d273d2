"""A study on disk, read into frozen dataclasses: what is finished, and what is not yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError
from rlprior.evaluation.record import Record, read_records
from rlprior.runs.files import read_jsonl

STAGES = ("pretrain", "midtrain", "rl")
STAGE_LABELS = {"pretrain": "pre-training", "midtrain": "mid-training", "rl": "RL"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One objective under comparison."""

    name: str
    label: str
    objective: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage of one arm under one seed: its training metrics and the evaluations of its checkpoints."""

    arm: str
    seed: int
    stage: str
    metrics: tuple[Mapping[str, Any], ...]
    checkpoints: tuple[Record, ...]

    @property
    def final(self) -> Record | None:
        """Evaluation of the stage's last checkpoint; None while there is none."""
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.final), None)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as far as it has got; `model` and `config` say what was run, for the report."""

    name: str
    arms: tuple[Arm, ...]
    baseline: str
    seeds: tuple[int, ...]
    stages: tuple[str, ...]
    runs: Mapping[tuple[str, int, str], StageRun]
    model: Mapping[str, Any]
    config: Mapping[str, Any]
    hardware: Mapping[str, Any]
    versions: Mapping[str, Any]
    command: str
    wall_seconds: Mapping[str, float]
    notes: tuple[str, ...]

    def final(self, arm: str, seed: int, stage: str) -> Record | None:
        """Last evaluation of an arm's stage under a seed; None while it is not finished."""
        run = self.runs.get((arm, seed, stage))
        return run.final if run else None

    @property
    def missing(self) -> tuple[tuple[str, int, str], ...]:
        """(arm, seed, stage) of each evaluation that is not finished."""
        return tuple(
            (arm.name, seed, stage)
            for arm in self.arms
            for seed in self.seeds
            for stage in self.stages
            if self.final(arm.name, seed, stage) is None
        )


def load_study(directory: Path) -> Study:
    """Read a study directory; runs that have written nothing yet are part of `Study.missing`.

    Raises:
        UsageError: `directory` holds no study.
        RunError: a file of the study is damaged or lacks a field; the message names it.
    """
    path = directory / "study.json"
    if not path.is_file():
        raise UsageError(f"{directory}: no study.json there; give the directory that `rlprior study` wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path}: not valid JSON ({error}); run the study again, it goes on from there"
        ) from None
    try:
        arms = tuple(Arm(name=a["name"], label=a["label"], objective=a["objective"]) for a in data["arms"])
        runs = [_load_run(directory, entry) for entry in data["runs"]]
        study = Study(
            name=data["name"],
            arms=arms,
            baseline=data["baseline"],
            seeds=tuple(data["seeds"]),
            stages=tuple(stage for stage in STAGES if any(run.stage == stage for run in runs)),
            runs={(run.arm, run.seed, run.stage): run for run in runs},
            model=data.get("model", {}),
            config=data.get("config", {}),
            hardware=data["hardware"],
            versions=data["versions"],
            command=data["command"],
            wall_seconds=data["wall_seconds"],
            notes=tuple(data["notes"]),
        )
    except KeyError as error:
        raise RunError(f"{path}: the field {error} is missing; run the study again to write it") from None
    _check_names(path, study)
    return study


def _check_names(path: Path, study: Study) -> None:
    names = [arm.name for arm in study.arms]
    if len(set(names)) != len(names) or not names:
        raise RunError(f"{path}: arms need different names, and there must be one at least, not {names}")
    if study.baseline not in names:
        raise RunError(f"{path}: the baseline {study.baseline!r} is not one of the arms {', '.join(names)}")
    for arm, seed, stage in study.runs:
        if arm not in names or seed not in study.seeds or stage not in STAGES:
            raise RunError(
                f"{path}: a run of arm {arm!r}, seed {seed}, stage {stage!r} is not part of the study"
            )


def _load_run(directory: Path, entry: Mapping[str, Any]) -> StageRun:
    return StageRun(
        arm=entry["arm"],
        seed=entry["seed"],
        stage=entry["stage"],
        metrics=tuple(_read_metrics(directory / entry["directory"] / "metrics.jsonl")),
        checkpoints=read_records(directory / entry["evaluation"]),
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path)
    except ValueError as error:
        raise RunError(f"{path}: not JSON lines ({error}); delete it and run the study again") from None
