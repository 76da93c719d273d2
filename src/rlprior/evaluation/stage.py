"""The evaluation stage: every checkpoint of a run, held-out likelihood and answers, one record each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlprior.data.packing import Corpus
from rlprior.evaluation.config import Budget, EvaluationConfig
from rlprior.evaluation.token_statistics import summarise_tokens
from rlprior.models.causal_lm import load_model, load_tokenizer
from rlprior.models.likelihood import (
    HeldOutDocument,
    held_out_documents,
    measure_tokens,
    unigram_cross_entropy,
)
from rlprior.runs.files import read_jsonl, write_atomically
from rlprior.runs.folder import Run
from rlprior.sampling.answers import answer_problems, frequent_answers_baseline
from rlprior.tasks.config import data_folder, load_task
from rlprior.tasks.problem import UNGRADED, Problem
from rlprior.tasks.verifier import open_verifier
from rlprior.training.checkpoint import MANIFEST_FILE, checkpoint_directory
from rlprior.world import ALONE

CODE = (
    "rlprior.evaluation",
    "rlprior.tasks",
    "rlprior.sampling",
    "rlprior.statistics",
    "rlprior.objectives",
    "rlprior.models",
    "rlprior.data.corpus",
    "rlprior.data.packing",
    "rlprior.data.tokenizer",
    "rlprior.seeding",
)
SEED = 0
"""Questions and sampling of evaluations do not change with the seed of training: all runs meet the same ones."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRunConfig:
    """A run of the evaluation stage.

    Args:
        evaluation: what is measured.
        target: folder of a training or RL run, or, where `steps` is empty, a Hugging Face folder.
        corpus: prepared corpus, whose held-out documents are the text.
        stage: what the records call the target's stage.
        window_tokens: longest context of a predicted token.
        steps: checkpoints of the run, in order; the last has the final budget.
        data_dir: folder that the tasks' relative paths start from.
    """

    evaluation: EvaluationConfig
    target: str
    corpus: str
    stage: str
    window_tokens: int
    steps: tuple[int, ...] = ()
    data_dir: str | None = None


@dataclass(frozen=True)
class _Material:
    """What every checkpoint is measured on."""

    documents: list[HeldOutDocument]
    unigram_nats: list[float]
    problems: dict[str, list[Problem]]


def run(config: EvaluationRunConfig, run: Run) -> Path:
    """Measure each checkpoint that has no record yet. Returns the file of records."""
    path = run.directory / "results.jsonl"
    if run.result is not None:
        return path
    target = Path(config.target)
    folders = [checkpoint_directory(target, step) for step in config.steps] or [target]
    records = read_jsonl(path)
    material = _gather(config)
    for number, folder in enumerate(folders):
        if number < len(records):
            continue
        is_final = number == len(folders) - 1
        budget = config.evaluation.final if is_final else config.evaluation.intermediate
        progress = _Progress(run, number, len(folders), _num_units(material, budget))
        records.append(_measure(config, run, folder, _share(material, budget), budget, is_final, progress))
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
    run.finish({"num_checkpoints": len(records)})
    return path


def _gather(config: EvaluationRunConfig) -> _Material:
    evaluation = config.evaluation
    corpus = Corpus.open(Path(config.corpus))
    documents = held_out_documents(corpus, evaluation.held_out_sources, evaluation.final.held_out_tokens)
    problems = {
        name: load_task(
            task,
            split="test",
            num_problems=evaluation.final.num_problems,
            seed=SEED,
            data_dir=data_folder(config.data_dir),
        )
        for name, task in evaluation.tasks.items()
    }
    return _Material(
        documents, unigram_cross_entropy(corpus, evaluation.held_out_sources, documents), problems
    )


def _share(material: _Material, budget: Budget) -> _Material:
    """What a budget pays for: a prefix of the documents and of each task's problems, so that it pairs with the final set.

    Both orders are balanced in every prefix.
    """
    totals = np.cumsum([len(document.token_ids) - 1 for document in material.documents])
    num_documents = int(np.searchsorted(totals, budget.held_out_tokens)) + 1
    return _Material(
        material.documents[:num_documents],
        material.unigram_nats[:num_documents],
        {name: problems[: budget.num_problems] for name, problems in material.problems.items()},
    )


def _num_units(material: _Material, budget: Budget) -> int:
    return (
        sum(min(len(p), budget.num_problems) for p in material.problems.values()) * budget.samples_per_problem
    )


class _Progress:
    """Counts responses over all checkpoints; checkpoints are taken to cost the same."""

    def __init__(self, run: Run, number: int, num_checkpoints: int, num_units: int) -> None:
        self.run, self.number, self.num_checkpoints, self.num_units, self.done = (
            run,
            number,
            num_checkpoints,
            num_units,
            0,
        )

    def __call__(self, num_responses: int) -> None:
        self.done += num_responses
        share = self.number + self.done / max(1, self.num_units)
        note = f"checkpoint {self.number + 1} of {self.num_checkpoints}"
        self.run.progress(round(100 * share), 100 * self.num_checkpoints, unit="%", note=note)


def _measure(
    config: EvaluationRunConfig,
    run: Run,
    folder: Path,
    material: _Material,
    budget: Budget,
    is_final: bool,
    progress: _Progress,
) -> dict[str, Any]:
    evaluation = config.evaluation
    model: Any = load_model(folder)
    model, tokenizer = model.to(ALONE.device), load_tokenizer(folder)
    manifest = folder / MANIFEST_FILE
    checkpoint = json.loads(manifest.read_text()) if manifest.exists() else {"step": 0, "state": {}}
    tokens = measure_tokens(
        model, material.documents, window_tokens=config.window_tokens, top_k=evaluation.top_k
    )
    likelihood = {**tokens.by_document(), "unigram_cross_entropy_nats": material.unigram_nats}
    tasks: dict[str, Any] = {}
    for name, problems in material.problems.items():
        with open_verifier(
            evaluation.tasks[name], data_folder(config.data_dir), merge_votes=True
        ) as verifier:
            columns = answer_problems(
                model,
                tokenizer,
                problems,
                name=name,
                path=run.directory / "samples" / f"{name}-{checkpoint['step']:08d}.jsonl",
                model_identity=f"{run.identity.inputs.get('target', config.target)}/{checkpoint['step']}",
                samples_per_problem=budget.samples_per_problem,
                decoding=evaluation.decoding,
                seed=SEED,
                progress=progress,
                verifier=verifier,
            )
        baseline = frequent_answers_baseline(
            [problem.answer for problem in problems], budget.samples_per_problem
        )
        tasks[name] = {
            "num_samples": budget.samples_per_problem,
            "temperature": evaluation.decoding.temperature,
            "top_p": evaluation.decoding.top_p,
            "max_new_tokens": evaluation.decoding.max_new_tokens,
            "baseline_accuracy": baseline[0],
            "baseline_pass_at_k": baseline,
            **columns,
        }
    return {
        "stage": config.stage,
        "step": checkpoint["step"],
        "tokens": checkpoint["state"].get("tokens", 0),
        "final": is_final,
        "likelihood": likelihood,
        "text": summarise_tokens(tokens),
        "tasks": tasks,
    }


def describe_results(directory: Path) -> str:
    """The last record's headline numbers, a line each."""
    record = read_jsonl(directory / "results.jsonl")[-1]
    likelihood = {
        name: np.sum(values) for name, values in record["likelihood"].items() if name != "document_ids"
    }
    num_tokens = likelihood["num_tokens"]
    lines = [
        f"held-out text ({num_tokens:,.0f} tokens): perplexity {np.exp(likelihood['cross_entropy_nats'] / num_tokens):.2f} "
        f"(unigram {np.exp(likelihood['unigram_cross_entropy_nats'] / num_tokens):.1f}), "
        f"entropy {likelihood['entropy_nats'] / num_tokens:.3f} nats",
        _describe_text(record["text"]),
    ]
    for name, task in record["tasks"].items():
        lines.append(_describe_task(name, task))
    return "\n".join(lines)


def _describe_text(text: dict[str, Any]) -> str:
    bits = "" if text["bits_per_byte"] is None else f"{text['bits_per_byte']:.3f} bits per byte, "
    return (
        f"  {bits}mass of the {text['top_k']} most probable tokens {text['head_mass']:.3f}, target among them {text['top_k_share']:.1%}, "
        f"first {text['top1_share']:.1%}, calibration error {text['calibration_error']:.3f}"
    )


def _describe_task(name: str, task: dict[str, Any]) -> str:
    m, correct = task["num_samples"], np.array(task["num_correct"])
    total = m * len(correct)
    labels = {"num_truncated": "cut", "num_unparsable": "unparsable"}
    # a reader hears of these where there are any
    labels |= {f"num_{one}": one.replace("_", " ") for one in UNGRADED if any(task[f"num_{one}"])}
    shares = [f"{label} {sum(task[key]) / total:.1%}" for key, label in labels.items()]
    return (
        f"{name} ({len(correct)} problems): Avg@{m} {correct.sum() / total:.3f}, Cons@{m} {np.mean(task['consensus']):.3f}, "
        f"Pass@{m} {np.mean(correct > 0):.3f}; {', '.join(shares)}; best constant answer {task['baseline_accuracy']:.3f}"
    )
