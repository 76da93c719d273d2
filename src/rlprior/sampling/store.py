"""Append-only store of samples: a header that says what was sampled, then one line a batch.

A batch is one line, so a kill leaves all of it or none of it: the resumed run meets the same batches and writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlprior.config import RunError, differing_keys
from rlprior.runs.files import disk_errors, read_jsonl

DecodingValue = int | float | str | bool | None


@dataclass(frozen=True, kw_only=True)
class StoreKey:
    """What determines the samples of one store.

    Attributes:
        model_hash: identity of the weights.
        task: name and version of the task, prompts included.
        decoding: temperature, top_p, max_new_tokens and whatever else the sampler reads.
        seed: seed of the sampler's streams.
    """

    model_hash: str
    task: str
    decoding: Mapping[str, DecodingValue]
    seed: int

    def as_data(self) -> dict[str, Any]:
        """Plain data, as the header holds it."""
        return {**dataclasses.asdict(self), "decoding": dict(self.decoding)}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response.

    Attributes:
        problem_id: the problem it answers.
        sample_index: which of the problem's samples it is, from 0.
        token_ids: tokens of the response, the prompt's left out.
        text: the same, decoded.
        finish_reason: "stop" at the end-of-text token, "length" at the limit.
        log_prob_nats: sum of the tokens' log-probabilities under the distribution that they were drawn from.
        num_tokens: length of `token_ids`.
    """

    problem_id: str
    sample_index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    log_prob_nats: float
    num_tokens: int


@dataclass
class SampleStore:
    """Samples on disk and in memory; open it with `SampleStore.open`. One process at a time writes to it."""

    path: Path
    key: StoreKey
    _samples: dict[tuple[str, int], Sample] = field(default_factory=dict, repr=False)

    @staticmethod
    def open(path: Path, key: StoreKey) -> SampleStore:
        """Open the store at `path`, or create it with its header; a line torn by a kill is dropped.

        Raises:
            RunError: the file holds samples of another key, or a line before the last is damaged.
        """
        store = SampleStore(path, key)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.read_bytes() if path.exists() else b""
            kept = whole[: whole.rfind(b"\n") + 1]
            if kept != whole:
                os.truncate(path, len(kept))
        lines = kept.splitlines()
        if not lines:
            store._write({"format": 1, "key": key.as_data()})
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if number == 1:
                    store._check_key(record["key"])
                else:
                    store._remember([_decode_sample(data) for data in record["samples"]])
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path}:{number}: not a line of a sample store; delete the file") from None
        return store

    def append(self, samples: Sequence[Sample]) -> None:
        """Add a batch, all of it or nothing, and flush it to disk before returning.

        Raises:
            ValueError: a sample that the store holds already.
            RunError: the disk is full; the store is as it was before.
        """
        batch = list(samples)
        places = [(sample.problem_id, sample.sample_index) for sample in batch]
        repeated = [place for place in places if place in self._samples or places.count(place) > 1]
        if repeated:
            raise ValueError(f"{self.path}: sample {repeated[0]} is in the store already")
        self._write({"samples": [dataclasses.asdict(sample) for sample in batch]})
        self._remember(batch)

    def missing(self, problem_ids: Sequence[str], num_samples: int) -> list[tuple[str, int]]:
        """The (problem, index) pairs that the store lacks: problem by problem in the order given, indices rising."""
        wanted = ((problem, index) for problem in problem_ids for index in range(num_samples))
        return [place for place in wanted if place not in self._samples]

    def pool(self, problem_ids: Sequence[str], num_samples: int) -> list[list[Sample]]:
        """The first `num_samples` samples of each problem.

        Raises:
            RunError: some are missing; a short pool is refused, never scored as wrong.
        """
        missing = self.missing(problem_ids, num_samples)
        if missing:
            problem, index = missing[0]
            raise RunError(
                f"{self.path}: {len(missing)} of {len(problem_ids) * num_samples} samples are missing, the first is "
                f"sample {index} of problem {problem}; run the same evaluation again, it fills them in"
            )
        return [[self._samples[problem, i] for i in range(num_samples)] for problem in problem_ids]

    def _check_key(self, found: Any) -> None:
        expected = json.loads(json.dumps(self.key.as_data()))
        different = differing_keys(found, expected)
        if different:
            raise RunError(
                f"{self.path}: holds samples of another run (it differs in {', '.join(different)}); use another "
                "directory, or delete that file"
            )

    def _remember(self, samples: Sequence[Sample]) -> None:
        self._samples.update({(sample.problem_id, sample.sample_index): sample for sample in samples})

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        with disk_errors(self.path), self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                remaining = memoryview(line)
                while remaining:
                    remaining = remaining[file.write(remaining) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise


def read_samples(path: Path) -> list[Sample]:
    """All samples of a store, in the order written, whatever its key; nothing is written, and a torn last line is passed over.

    Raises:
        RunError: not a store of samples, or damaged.
    """
    try:
        header, *batches = read_jsonl(path)
        if header["format"] != 1:
            raise ValueError
        return [_decode_sample(data) for batch in batches for data in batch["samples"]]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: not a store of samples, or damaged") from None


def _decode_sample(data: Mapping[str, Any]) -> Sample:
    return Sample(**{**data, "token_ids": tuple(data["token_ids"])})
