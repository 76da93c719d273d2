"""What an evaluation says of a checkpoint: one record, written by one stage and read by everything else.

results.jsonl holds a record a line, format 2. Folders made before are read too: results.jsonl without a format (of studies and of
`evaluate --config`), results.json (of `evaluate --suite`) and readiness.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlprior.config import RunError
from rlprior.runs.files import read_jsonl

FloatArray = npt.NDArray[np.float64]

FORMAT = 2
RECORDS_FILE = "results.jsonl"
SETTINGS = ("temperature", "top_p", "max_new_tokens", "precision", "metric", "num_shots", "version", "grader")
"""What of a task's entry has to agree for a difference to be the models' alone."""


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Sums over the tokens of each held-out document, all float64 of shape [number of documents].

    Attributes:
        unigram_cross_entropy_nats: of the sources' unigram model; nan where it was not measured.
        reference_kl_nats: KL(reference || model); empty without a reference.
    """

    document_ids: tuple[str, ...]
    num_tokens: FloatArray
    num_bytes: FloatArray
    cross_entropy_nats: FloatArray
    entropy_nats: FloatArray
    head_mass: FloatArray
    unigram_cross_entropy_nats: FloatArray
    reference_kl_nats: FloatArray


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Counts over the samples of each problem of a task or benchmark, arrays of shape [number of problems].

    Attributes:
        num_samples: samples per problem, m; 1 of choices by likelihood.
        consensus: expected majority vote, in [0, 1]; empty where there is no vote (programs, instructions, likelihood).
        num_truncated, num_unparsable, num_tokens: of sampled answers; 0 of choices by likelihood.
        baseline_pass_at_k: Pass@k of always giving the k most frequent answers, k = 1 to m, in [0, 1]; empty where it means
            nothing.
        settings: what of `SETTINGS` was written down.
        entry: all that was written, as plain data.
    """

    problem_ids: tuple[str, ...]
    num_samples: int
    num_correct: npt.NDArray[np.int64]
    consensus: FloatArray
    num_truncated: FloatArray
    num_unparsable: FloatArray
    num_tokens: FloatArray
    baseline_pass_at_k: tuple[float, ...]
    settings: Mapping[str, Any]
    entry: Mapping[str, Any]

    @property
    def temperature(self) -> float:
        """Of the samples; nan of choices by likelihood."""
        return float(self.settings.get("temperature", np.nan))

    @property
    def top_p(self) -> float:
        """Of the samples; nan of choices by likelihood."""
        return float(self.settings.get("top_p", np.nan))

    @property
    def max_new_tokens(self) -> int:
        """Of the samples; 0 of choices by likelihood."""
        return int(self.settings.get("max_new_tokens") or 0)

    @property
    def baseline_accuracy(self) -> float | None:
        """Accuracy of always giving the most frequent answer, or None where it means nothing."""
        return next(iter(self.baseline_pass_at_k), None)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Evaluation of one checkpoint.

    Attributes:
        stage: "pretrain", "midtrain", "rl" and so on of a run; "model" of a Hugging Face folder.
        step: 0 of a Hugging Face folder.
        tokens: training tokens since the start of pre-training; 0 where it is not known.
        final: whether it is the run's last checkpoint, measured with the final budget.
        likelihood: of the held-out text; None where none was asked.
        text: what `summarise_tokens` says of the held-out text; None where none was asked.
        tasks: scores by the name of the task or benchmark.
        settings: what else was written down of the model and the measurement, as plain data: `num_parameters`, a hash of the
            `tokenizer`, `decoding`, of benchmarks `suites` and those `missing` for want of data.
    """

    stage: str
    step: int
    tokens: int
    final: bool
    likelihood: Likelihood | None
    text: Mapping[str, Any] | None
    tasks: Mapping[str, TaskScores]
    settings: Mapping[str, Any]


def read_records(directory: Path) -> tuple[Record, ...]:
    """Every record in the folder of an evaluation, in order of step; none where nothing is finished.

    Raises:
        RunError: a file that is damaged, with its line and what is the matter.
    """
    found: list[Record] = []
    for place, data in _read_plain(directory):
        try:
            found.append(decode_record(data))
        except KeyError as error:
            raise RunError(f"{place}: the field {error} is missing") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{place}: {error}") from None
    return tuple(sorted(found, key=lambda record: (record.step, record.final)))


def _read_plain(directory: Path) -> list[tuple[str, Any]]:
    """Records as plain data of the present format or the first, with the file and line of each."""
    path = directory / RECORDS_FILE
    if path.is_file():
        try:
            return [(f"{path}:{line}", data) for line, data in enumerate(read_jsonl(path), start=1)]
        except ValueError as error:
            raise RunError(
                f"{path}: not JSON lines ({error}); delete it and run the evaluation again"
            ) from None
    for name, translate in (("results.json", _from_suite), ("readiness.json", _from_readiness)):
        path = directory / name
        if not path.is_file():
            continue
        try:
            return [(str(path), translate(json.loads(path.read_text(encoding="utf-8"))))]
        except KeyError as error:
            raise RunError(f"{path}: the field {error} is missing") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path}: not what `rlprior evaluate` writes ({error})") from None
    return []


_OF_A_MODEL = {"stage": "model", "step": 0, "tokens": 0, "final": True}


def _from_suite(data: Mapping[str, Any]) -> dict[str, Any]:
    """results.json, the first format of suites: one model, decoding apart from the benchmarks."""
    shared = data["decoding"]
    tasks = {
        # likelihoods are not sampled, whatever the decoding
        name: dict(entry) if entry.get("metric") == "likelihood" else {**shared, **entry}
        for name, entry in data["benchmarks"].items()
    }
    settings = {"decoding": shared, "missing": data.get("missing", {})}
    if "suite" in data:
        settings["suites"] = [data["suite"]]
    if "model" in data:
        settings["model"] = data["model"]
    return {**_OF_A_MODEL, "tasks": tasks, "settings": settings}


def _from_readiness(data: Mapping[str, Any]) -> dict[str, Any]:
    """readiness.json: one model with its decoding, without a unigram model of the text."""
    decoding = data["decoding"]
    sampled = {name: decoding[name] for name in ("temperature", "top_p", "max_new_tokens")}
    unknown = [np.nan] * len(data["likelihood"]["document_ids"])
    return {
        **_OF_A_MODEL,
        "likelihood": {"unigram_cross_entropy_nats": unknown, **data["likelihood"]},
        "text": data["text"],
        "tasks": {name: {**sampled, **entry} for name, entry in data["tasks"].items()},
        "settings": {name: data[name] for name in ("num_parameters", "tokenizer", "decoding")},
    }


def decode_record(data: Mapping[str, Any]) -> Record:
    """A record from plain data of the first format of results.jsonl, or of the present one.

    Raises:
        KeyError: a field is missing.
        TypeError, ValueError: a field that cannot be.
    """
    version = data.get("format", 1)
    if version not in (1, FORMAT):
        raise ValueError(f"format {version} is of a later version; this one reads up to {FORMAT}")
    likelihood = data.get("likelihood")
    return Record(
        stage=data["stage"],
        step=int(data["step"]),
        tokens=int(data["tokens"]),
        final=bool(data["final"]),
        likelihood=_decode_likelihood(likelihood) if likelihood else None,
        text=data.get("text") or None,
        tasks={name: decode_task(entry) for name, entry in (data.get("tasks") or {}).items()},
        settings=data.get("settings") or {},
    )


def _decode_likelihood(data: Mapping[str, Any]) -> Likelihood:
    ids = _read_ids(data["document_ids"], "likelihood")
    names = ("num_tokens", "num_bytes", "cross_entropy_nats", "entropy_nats", "head_mass")
    kl_nats = "reference_kl_nats"
    return Likelihood(
        document_ids=ids,
        **_columns(data, names, ids, "likelihood"),
        **_columns(data, ("unigram_cross_entropy_nats",), ids, "likelihood", may_be_nan=True),
        reference_kl_nats=_columns(data, (kl_nats,), ids, "likelihood")[kl_nats]
        if kl_nats in data
        else np.zeros(0),
    )


def decode_task(data: Mapping[str, Any]) -> TaskScores:
    """Scores of a task or benchmark from its entry in a record.

    Raises:
        KeyError: a column is missing.
        TypeError, ValueError: columns of different lengths, ids twice, counts that cannot be.
    """
    ids = _read_ids(data["problem_ids"], "task")
    num_samples = int(data["num_samples"])
    correct = _columns(data, ("num_correct",), ids, "task")["num_correct"]
    if (correct != np.floor(correct)).any():
        raise ValueError("task.num_correct must be whole numbers")
    if correct.min() < 0 or correct.max() > num_samples:
        raise ValueError(f"num_correct must lie between 0 and num_samples = {num_samples}")
    counts = ("num_truncated", "num_unparsable", "num_tokens")
    if data.get("metric") == "likelihood":
        columns = {name: np.zeros(len(ids)) for name in counts}
    else:
        columns = _columns(data, counts, ids, "task")
    votes = np.zeros(0)
    if data.get("consensus"):  # empty where nothing votes: programs, instructions
        votes = _columns(data, ("consensus",), ids, "task")["consensus"]
    if not ((votes >= 0) & (votes <= 1)).all():
        raise ValueError("consensus must lie between 0 and 1")
    return TaskScores(
        problem_ids=ids,
        num_samples=num_samples,
        num_correct=correct.astype(np.int64),
        consensus=votes,
        baseline_pass_at_k=tuple(float(one) for one in data.get("baseline_pass_at_k") or ()),
        settings={name: data[name] for name in SETTINGS if name in data},
        entry=data,
        **columns,
    )


def _read_ids(ids: Sequence[Any], where: str) -> tuple[str, ...]:
    names = tuple(str(one) for one in ids)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{where}: ids must be there, and each once")
    return names


def _columns(
    data: Mapping[str, Any], names: Sequence[str], ids: Sequence[str], where: str, *, may_be_nan: bool = False
) -> dict[str, FloatArray]:
    """The named lists as float64, each of one finite value an id."""
    columns = {name: np.asarray(data[name], dtype=np.float64) for name in names}
    for name, values in columns.items():
        if values.shape != (len(ids),) or not (may_be_nan or np.isfinite(values).all()):
            raise ValueError(f"{where}.{name} must be {len(ids)} finite numbers, one an id")
    return columns
