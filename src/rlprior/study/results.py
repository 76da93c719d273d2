"""A study on disk, read into frozen dataclasses: what is finished, and what is not yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlprior.config import RunError, UsageError
from rlprior.runs.files import read_jsonl

FloatArray = npt.NDArray[np.float64]

STAGES = ("pretrain", "midtrain", "rl")
STAGE_LABELS = {"pretrain": "pre-training", "midtrain": "mid-training", "rl": "RL"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One objective under comparison."""

    name: str
    label: str
    objective: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Sums over the tokens of each held-out document, all float64 of shape [number of documents]."""

    document_ids: tuple[str, ...]
    num_tokens: FloatArray
    num_bytes: FloatArray
    cross_entropy_nats: FloatArray
    entropy_nats: FloatArray
    head_mass: FloatArray
    unigram_cross_entropy_nats: FloatArray


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Counts over the samples of each held-out problem, arrays of shape [number of problems].

    Attributes:
        num_samples: samples per problem, m.
        consensus: expected majority vote, in [0, 1].
        baseline_pass_at_k: Pass@k of always giving the k most frequent answers, k = 1 to m, in [0, 1]; empty where it means
            nothing.
    """

    problem_ids: tuple[str, ...]
    num_samples: int
    num_correct: npt.NDArray[np.int64]
    consensus: FloatArray
    num_truncated: FloatArray
    num_unparsable: FloatArray
    num_tokens: FloatArray
    temperature: float
    top_p: float
    max_new_tokens: int
    baseline_pass_at_k: tuple[float, ...]

    @property
    def baseline_accuracy(self) -> float | None:
        """Accuracy of always giving the most frequent answer, or None where it means nothing."""
        return next(iter(self.baseline_pass_at_k), None)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Evaluation of one checkpoint; `tokens` counts training tokens since the start of pre-training."""

    stage: str
    step: int
    tokens: int
    final: bool
    likelihood: Likelihood | None
    tasks: Mapping[str, TaskScores]


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage of one arm under one seed: its training metrics and the evaluations of its checkpoints."""

    arm: str
    seed: int
    stage: str
    metrics: tuple[Mapping[str, Any], ...]
    checkpoints: tuple[Checkpoint, ...]

    @property
    def final(self) -> Checkpoint | None:
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

    def final(self, arm: str, seed: int, stage: str) -> Checkpoint | None:
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
    results = directory / entry["evaluation"] / "results.jsonl"
    checkpoints: list[Checkpoint] = []
    for number, record in enumerate(_read_records(results), start=1):
        try:
            checkpoints.append(_decode_checkpoint(record))
        except KeyError as error:
            raise RunError(f"{results}:{number}: the field {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise RunError(f"{results}:{number}: {error}") from None
    return StageRun(
        arm=entry["arm"],
        seed=entry["seed"],
        stage=entry["stage"],
        metrics=tuple(_read_records(directory / entry["directory"] / "metrics.jsonl")),
        checkpoints=tuple(sorted(checkpoints, key=lambda checkpoint: (checkpoint.step, checkpoint.final))),
    )


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path)
    except ValueError as error:
        raise RunError(f"{path}: not JSON lines ({error}); delete it and run the study again") from None


def _decode_checkpoint(record: Mapping[str, Any]) -> Checkpoint:
    likelihood = record.get("likelihood")
    return Checkpoint(
        stage=record["stage"],
        step=int(record["step"]),
        tokens=int(record["tokens"]),
        final=bool(record["final"]),
        likelihood=_decode_likelihood(likelihood) if likelihood else None,
        tasks={name: _decode_task(scores) for name, scores in (record.get("tasks") or {}).items()},
    )


def _decode_likelihood(data: Mapping[str, Any]) -> Likelihood:
    ids = tuple(str(one) for one in data["document_ids"])
    names = (
        "num_tokens",
        "num_bytes",
        "cross_entropy_nats",
        "entropy_nats",
        "head_mass",
        "unigram_cross_entropy_nats",
    )
    return Likelihood(document_ids=ids, **_columns(data, names, ids, "likelihood"))


def _decode_task(data: Mapping[str, Any]) -> TaskScores:
    ids = tuple(str(one) for one in data["problem_ids"])
    columns = _columns(data, ("consensus", "num_truncated", "num_unparsable", "num_tokens"), ids, "task")
    correct = _columns(data, ("num_correct",), ids, "task")["num_correct"].astype(np.int64)
    num_samples = int(data["num_samples"])
    if correct.min() < 0 or correct.max() > num_samples:
        raise ValueError(f"num_correct must lie between 0 and num_samples = {num_samples}")
    return TaskScores(
        problem_ids=ids,
        num_samples=num_samples,
        num_correct=correct,
        temperature=float(data["temperature"]),
        top_p=float(data["top_p"]),
        max_new_tokens=int(data["max_new_tokens"]),
        baseline_pass_at_k=tuple(float(one) for one in data.get("baseline_pass_at_k") or ()),
        **columns,
    )


def _columns(
    data: Mapping[str, Any], names: Sequence[str], ids: Sequence[str], where: str
) -> dict[str, FloatArray]:
    """The named lists as float64, each of one finite value an id."""
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"{where}: ids must be there, and each once")
    columns = {name: np.asarray(data[name], dtype=np.float64) for name in names}
    for name, values in columns.items():
        if values.shape != (len(ids),) or not np.isfinite(values).all():
            raise ValueError(f"{where}.{name} must be {len(ids)} finite numbers, one an id")
    return columns
