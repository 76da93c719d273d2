"""A suite of benchmarks asked of one model. It may be killed at any moment, and asked for more later: what there is stays.

OUT/samples/NAME.jsonl   samples of a benchmark, with .questions.jsonl and .grades.jsonl beside
OUT/choices/NAME.json    log-likelihoods of a benchmark's choices
OUT/results.json         counts, a question each, of every benchmark
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlprior.config import HOW, RunError, UsageError, fingerprint
from rlprior.evaluation.choices import score_choices
from rlprior.models.causal_lm import load_model, load_tokenizer
from rlprior.runs.files import write_json
from rlprior.runs.folder import Run
from rlprior.runs.identity import code_fingerprint
from rlprior.sampling.answers import answer_problems, prompt_room
from rlprior.sampling.sampler import Decoding
from rlprior.tasks.benchmarks.benchmark import Benchmark, load_benchmark
from rlprior.tasks.benchmarks.graders import open_grader
from rlprior.tasks.benchmarks.suites import BENCHMARKS, SUITES, Entry
from rlprior.tasks.config import data_folder
from rlprior.tasks.problem import Problem
from rlprior.tasks.verifier import Verifier
from rlprior.training.engine import Precision
from rlprior.world import ALONE

CODE = (
    "rlprior.sampling.answers",
    "rlprior.evaluation.choices",
    "rlprior.data.tokenizer",
    "rlprior.models",
    "rlprior.objectives",
    "rlprior.seeding",
)
"""What decides what is drawn and how probable it is; prompts and limits are kept with it, and checked."""
COUNTING_CODE = ("rlprior.evaluation", "rlprior.tasks", "rlprior.sampling", "rlprior.statistics")
"""What decides what it counts as: where that changes, what there is is counted anew."""
SEED = 0
"""Questions and sampling are the same for every model."""

RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """How much is asked; a later run may ask for more, and goes on with what there is.

    Args:
        samples_per_question: pool size m of every sampled benchmark (128 in the paper).
        max_questions: of each benchmark, drawn at random and evenly from its groups; None for all.
        benchmarks: of the suite these alone; none for all.
        skip_missing: leave out the benchmarks whose data is not there.
    """

    samples_per_question: int = 128
    max_questions: int | None = None
    benchmarks: tuple[str, ...] = ()
    skip_missing: bool = False

    def __post_init__(self) -> None:
        if self.samples_per_question < 1:
            raise ValueError(f"samples_per_question must be at least 1, not {self.samples_per_question}")
        if self.max_questions is not None and self.max_questions < 1:
            raise ValueError(f"max_questions must be at least 1, not {self.max_questions}")


@dataclass(frozen=True, kw_only=True)
class SuiteRunConfig:
    """A suite on one model.

    Args:
        target: Hugging Face folder.
        suite: key of `SUITES`.
        request: how much of it.
        temperature, top_p: of sampled answers; the papers' for base models.
        max_new_tokens: limit of a sampled answer; None for the suite's or the benchmark's own.
        precision: dtype of the weights: 'auto' is bfloat16 on GPUs and float32 on CPUs.
        num_workers: processes that grade.
        unsafe_exec: run programs where they cannot be isolated.
        data_dir: folder of the benchmarks' files; None for the hub.
    """

    target: str
    suite: str
    request: Request = field(default_factory=Request, metadata=HOW)  # how far it is, not what it is
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int | None = None
    precision: Precision = "auto"
    num_workers: int = field(default=2, metadata=HOW)
    unsafe_exec: bool = field(default=False, metadata=HOW)
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ValueError(f"suite = {self.suite!r} is unknown; write {', '.join(SUITES)}")
        names = [entry.benchmark for entry in SUITES[self.suite].entries]
        for name in self.request.benchmarks:
            if name not in names:
                raise ValueError(f"{self.suite} has no benchmark {name!r}; it has {', '.join(names)}")
        Decoding(temperature=self.temperature, top_p=self.top_p)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    def decoding(self, entry: Entry) -> Decoding:
        """How answers to a benchmark are drawn."""
        benchmark = BENCHMARKS[entry.benchmark]
        return Decoding(
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens or entry.max_new_tokens or benchmark.max_new_tokens,
            stop=benchmark.stop if entry.stop is None else entry.stop,
        )


@dataclass(frozen=True)
class _Asked:
    """A benchmark and its questions."""

    entry: Entry
    problems: list[Problem]

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.entry.benchmark]

    def num_units(self, samples_per_question: int) -> int:
        """Samples to draw, or questions whose choices are scored."""
        return len(self.problems) * (samples_per_question if self.benchmark.metric == "sampled" else 1)


def is_answered(directory: Path, config: SuiteRunConfig) -> bool:
    """Whether the finished run in `directory` holds just what is asked, of the data and counted as they are now."""
    result = json.loads((directory / "result.json").read_text())
    return result.get("asked") == _fingerprint_asked(config)


def _fingerprint_asked(config: SuiteRunConfig) -> str:
    """Changes with how much is asked, with the data, and with the code that counts."""
    asked, missing = _gather(config)
    problems = [[one.entry.benchmark, one.problems] for one in asked]
    return fingerprint([config.request, code_fingerprint(COUNTING_CODE), sorted(missing), problems])


def describe_request(config: SuiteRunConfig) -> str:
    """What there is to ask, a line.

    Raises:
        UsageError: a benchmark's data is not there, with the path or command that gives it.
    """
    _gather.cache_clear()  # files may have changed since
    asked, missing = _gather(config)
    num_answers = sum(one.num_units(config.request.samples_per_question) for one in asked)
    left_out = ", ".join(BENCHMARKS[name].title for name in missing)
    return (
        f"{len(asked)} benchmarks, {sum(len(one.problems) for one in asked):,} questions, {num_answers:,} answers to draw or score"
        + (f"; left out for want of data: {left_out}" if missing else "")
    )


def run(config: SuiteRunConfig, run: Run) -> Path:
    """Ask what has no answer yet. Returns the file of results.

    Raises:
        UsageError: a benchmark's data is not there, with the path or command that gives it.
        RunError: programs cannot be isolated on this machine.
    """
    path = run.directory / RESULTS_FILE
    if run.result is not None:
        return path
    asked, missing = _gather(config)  # before the model is read: what is not there is told at once
    folder = Path(config.target)
    model, tokenizer = _load(folder, config.precision), load_tokenizer(folder)
    for one in asked:  # hours of other benchmarks would come first
        if one.benchmark.metric == "sampled":
            prompt_room(model, config.decoding(one.entry))
            with _open_grader(config, one.benchmark):
                pass
    progress = _Progress(run, sum(one.num_units(config.request.samples_per_question) for one in asked))
    benchmarks: dict[str, Any] = {}
    for one in asked:
        progress.note = one.benchmark.title
        benchmarks[one.benchmark.name] = _describe(one) | _measure(
            config, run, one, model, tokenizer, progress
        )
    results = {
        "format": 1,
        "model": config.target,
        "suite": config.suite,
        "decoding": {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "precision": config.precision,
        },
        "missing": missing,
        "benchmarks": benchmarks,
    }
    write_json(path, results)
    run.finish({"asked": _fingerprint_asked(config), "num_benchmarks": len(benchmarks)})
    return path


@functools.lru_cache(maxsize=1)
def _gather(config: SuiteRunConfig) -> tuple[list[_Asked], dict[str, str]]:
    """The benchmarks asked for, and why others are left out."""
    data_dir = data_folder(config.data_dir)
    asked: list[_Asked] = []
    missing: dict[str, str] = {}
    for entry in SUITES[config.suite].entries:
        name = entry.benchmark
        if config.request.benchmarks and name not in config.request.benchmarks:
            continue
        try:
            problems = load_benchmark(
                BENCHMARKS[name],
                num_shots=entry.num_shots,
                data_dir=data_dir,
                limit=config.request.max_questions,
                seed=SEED,
            )
        except UsageError as error:
            missing[name] = str(error)
        else:
            asked.append(_Asked(entry, problems))
    if missing and (not asked or not config.request.skip_missing):
        listed = "\n  ".join(missing.values())
        raise UsageError(
            f"{len(missing)} of {len(asked) + len(missing)} benchmarks cannot be asked:\n  {listed}\n"
            "give their data, name others with --benchmarks, or write --skip-missing to ask those that are there"
        )
    return asked, missing


def resolve_precision(precision: Precision) -> Precision:
    """What 'auto' is here: a run that goes on elsewhere must not mix the two."""
    on_gpu = ALONE.device_type == "cuda"
    return ("bfloat16" if on_gpu else "float32") if precision == "auto" else precision


def _load(folder: Path, precision: Precision) -> Any:
    is_half = resolve_precision(precision) == "bfloat16"
    model: Any = load_model(folder)
    return model.to(ALONE.device, torch.bfloat16 if is_half else torch.float32)


class _Progress:
    """Counts samples and scored questions over all benchmarks."""

    def __init__(self, run: Run, total: int) -> None:
        self.run, self.total, self.done, self.note = run, total, 0, ""

    def __call__(self, count: int) -> None:
        self.done += count
        self.run.progress(self.done, self.total, unit="answers", note=self.note)


def _describe(one: _Asked) -> dict[str, Any]:
    benchmark = one.benchmark
    return {
        "title": benchmark.title,
        "category": benchmark.category,
        "metric": benchmark.metric,
        "num_shots": one.entry.num_shots,
        "version": benchmark.version,
        "groups": [problem.group for problem in one.problems],
    }


def _measure(
    config: SuiteRunConfig,
    run: Run,
    one: _Asked,
    model: Any,
    tokenizer: Any,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    benchmark, identity = one.benchmark, run.identity.inputs.get("target", config.target)
    task = f"{benchmark.name} {benchmark.version}, {one.entry.num_shots} shots"
    if benchmark.metric == "likelihood":
        return {"num_samples": 1, **_score(run, one, task, identity, model, tokenizer, progress)}
    with _open_grader(config, benchmark) as verifier:
        columns: dict[str, Any] = answer_problems(
            model,
            tokenizer,
            one.problems,
            name=task,
            path=run.directory / "samples" / f"{benchmark.name}.jsonl",
            model_identity=identity,
            samples_per_problem=config.request.samples_per_question,
            decoding=config.decoding(one.entry),
            seed=SEED,
            progress=progress,
            verifier=verifier,
        )
        columns["grader"] = verifier.version
    if benchmark.grading in ("code", "instructions"):  # nothing that could be voted on
        columns["consensus"] = []
    # the benchmark's own limit where none was asked for: two suites may differ in it
    limit = config.decoding(one.entry).max_new_tokens
    return {"num_samples": config.request.samples_per_question, "max_new_tokens": limit, **columns}


def _open_grader(config: SuiteRunConfig, benchmark: Benchmark) -> contextlib.AbstractContextManager[Verifier]:
    return open_grader(benchmark, num_workers=config.num_workers, unsafe_exec=config.unsafe_exec)


def _score(
    run: Run,
    one: _Asked,
    task: str,
    identity: str,
    model: Any,
    tokenizer: Any,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Log-likelihoods of choices, kept under what they belong to."""
    path = run.directory / "choices" / f"{one.benchmark.name}.json"
    key = fingerprint([task, identity, one.problems])
    if path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise RunError(f"{path}: damaged; delete it") from None
        if kept["key"] == key:
            progress(len(one.problems))
            return kept["columns"]
    columns = score_choices(
        model,
        tokenizer,
        one.problems,
        headline="normalized" if one.benchmark.length_normalised else "raw",
        progress=progress,
    )
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"key": key, "columns": columns})
    return columns
