"""What reinforcement learning could do with a model, measured before it: one pool of samples a task, and the model's predictions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlprior.config import fingerprint
from rlprior.data.packing import Corpus
from rlprior.data.tokenizer import encode_prompt
from rlprior.evaluation import stage
from rlprior.evaluation.choices import encode_continuation
from rlprior.evaluation.config import EvaluationConfig
from rlprior.evaluation.token_statistics import summarise_tokens
from rlprior.models.causal_lm import load_model, load_tokenizer
from rlprior.models.likelihood import (
    HeldOutDocument,
    TokenMeasurements,
    held_out_documents,
    measure_tokens,
)
from rlprior.runs.files import read_jsonl, write_json
from rlprior.runs.folder import Run
from rlprior.sampling.answers import answer_problems
from rlprior.sampling.grades import grades_of
from rlprior.sampling.store import Sample, read_samples
from rlprior.tasks.config import TaskConfig, data_folder, load_task
from rlprior.tasks.problem import Problem, Status
from rlprior.tasks.verifier import open_verifier
from rlprior.world import ALONE

CODE = stage.CODE
RESULT_FILE = "readiness.json"
RESPONSES_READ = 4
"""Responses of each problem whose tokens are measured: entropies need fewer than Pass@k."""


@dataclass(frozen=True, kw_only=True)
class ReadinessRunConfig:
    """A run of the readiness stage.

    Args:
        evaluation: text, tasks, decoding; its final budget.
        target: Hugging Face folder.
        corpus: prepared corpus with the model's own tokenizer, whose held-out documents are the text.
        window_tokens: longest context of a predicted token, the model's positions at most.
        data_dir: folder that the tasks' relative paths start from.
    """

    evaluation: EvaluationConfig
    target: str
    corpus: str
    window_tokens: int
    data_dir: str | None = None


def run(config: ReadinessRunConfig, run: Run) -> Path:
    """Measure the model, filling the pools that an interrupted run has begun. Returns the file of results."""
    path = run.directory / RESULT_FILE
    if run.result is not None:
        return path
    evaluation, folder = config.evaluation, Path(config.target)
    model: Any = load_model(folder)
    model, tokenizer = model.to(ALONE.device), load_tokenizer(folder)
    documents = held_out_documents(
        Corpus.open(Path(config.corpus)), evaluation.held_out_sources, evaluation.final.held_out_tokens
    )
    read = _Reader(model, tokenizer, config)
    text = read(documents)
    problems = {name: _problems(config, task) for name, task in evaluation.tasks.items()}
    total = sum(map(len, problems.values())) * evaluation.final.samples_per_problem
    done = 0

    def progress(num_responses: int) -> None:
        nonlocal done
        done += num_responses
        run.progress(done, total, unit="responses")

    record = {
        "format": 1,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokenizer": fingerprint(sorted(tokenizer.get_vocab().items())),
        "decoding": dataclasses.asdict(evaluation.decoding),
        "text": summarise_tokens(text),
        "likelihood": text.by_document(),
        "tasks": {
            name: _measure_task(config, run, name, problems[name], read, progress)
            for name in evaluation.tasks
        },
    }
    write_json(path, record)
    run.finish({"num_tasks": len(problems)})
    return path


def _problems(config: ReadinessRunConfig, task: TaskConfig) -> list[Problem]:
    num_problems = config.evaluation.final.num_problems
    return load_task(
        task, split="test", num_problems=num_problems, seed=stage.SEED, data_dir=data_folder(config.data_dir)
    )


class _Reader:
    """The model reading documents of any kind in the same way."""

    def __init__(self, model: Any, tokenizer: Any, config: ReadinessRunConfig) -> None:
        self.model, self.tokenizer = model, tokenizer
        longest = model.config.get_text_config().max_position_embeddings
        self._window_tokens, self._top_k = min(config.window_tokens, longest), config.evaluation.top_k

    def __call__(self, documents: Sequence[HeldOutDocument]) -> TokenMeasurements:
        return measure_tokens(self.model, documents, window_tokens=self._window_tokens, top_k=self._top_k)


def _measure_task(
    config: ReadinessRunConfig,
    run: Run,
    name: str,
    problems: list[Problem],
    read: _Reader,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    evaluation, m = config.evaluation, config.evaluation.final.samples_per_problem
    path = run.directory / "samples" / f"{name}.jsonl"
    with open_verifier(evaluation.tasks[name], data_folder(config.data_dir), merge_votes=True) as verifier:
        columns = answer_problems(
            read.model,
            read.tokenizer,
            problems,
            name=name,
            path=path,
            model_identity=run.identity.inputs.get("target", config.target),
            samples_per_problem=m,
            decoding=evaluation.decoding,
            seed=stage.SEED,
            progress=progress,
            verifier=verifier,
        )
    statuses = Counter(record["status"] for record in read_jsonl(grades_of(path))[1:])
    by_id = {problem.id: problem for problem in problems}
    responses = response_documents(
        read.tokenizer,
        by_id,
        [one for one in read_samples(path) if one.sample_index < RESPONSES_READ and one.problem_id in by_id],
    )
    return {
        "num_samples": m,
        **columns,
        "statuses": {str(status): statuses[status] for status in Status},
        "responses": summarise_tokens(read(responses)),
        "solutions": _measure_solutions(read, problems),
    }


def _measure_solutions(read: _Reader, problems: Sequence[Problem]) -> dict[str, Any] | None:
    """Worked solutions, read with their prompts given; None where the problems come without."""
    documents = solution_documents(read.tokenizer, [one for one in problems if one.solution.strip()])
    if not documents:
        return None
    tokens = read(documents)
    lasts = np.cumsum(tokens.num_tokens) - 1
    columns = tokens.by_document()
    return {
        **{name: value for name, value in summarise_tokens(tokens).items() if "quantiles" not in name},
        "end_prob": float(np.exp(-tokens.cross_entropy_nats[lasts].astype(np.float64)).mean()),
        "likelihood": {
            name: columns[name] for name in ("document_ids", "num_tokens", "num_bytes", "cross_entropy_nats")
        },
    }


def solution_documents(tokenizer: Any, problems: Sequence[Problem]) -> list[HeldOutDocument]:
    """Each problem's prompt, given, and its worked solution with the end-of-text token, to be predicted."""
    documents: list[HeldOutDocument] = []
    for problem in problems:
        given, following = encode_continuation(tokenizer, problem.prompt, problem.solution)
        ids = np.array([*given, *following, tokenizer.eos_token_id])
        num_bytes = len(problem.solution.encode())
        documents.append(HeldOutDocument(problem.id, ids, num_bytes, num_given=len(given)))
    return documents


def response_documents(
    tokenizer: Any, problems: dict[str, Problem], samples: Sequence[Sample]
) -> list[HeldOutDocument]:
    """Each sample's prompt, given, and the tokens that were drawn after it, to be predicted: by whoever reads them."""
    documents: list[HeldOutDocument] = []
    for sample in samples:
        given = encode_prompt(tokenizer, problems[sample.problem_id].prompt)
        documents.append(
            HeldOutDocument(
                id=f"{sample.problem_id}/{sample.sample_index}",
                token_ids=np.array([*given, *sample.token_ids]),
                num_bytes=len(sample.text.encode()),
                num_given=len(given),
            )
        )
    return documents
