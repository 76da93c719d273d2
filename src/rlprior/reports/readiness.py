"""Readiness of several models side by side: lines for a terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlprior.evaluation.judgement import (
    MIN_SIGNAL,
    ModelReadiness,
    compare_models,
    forking_shares,
    percent,
    share_one_tokenizer,
    tasks_of,
    text_rows,
    verdict_sentence,
)
from rlprior.reports.readiness_figures import draw_models, draw_prediction
from rlprior.reports.study import FIGURES_DIRECTORY, embed_picture, plain_data, template_environment
from rlprior.runs.files import disk_errors, write_atomically, write_json
from rlprior.statistics.intervals import Interval
from rlprior.study.prediction import Prediction, predict, prediction_cautions, prediction_sentences
from rlprior.study.results import load_study

PAGE_FILE = "readiness.html"
SUMMARY_FILE = "readiness.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionSection:
    """What a study says of readiness's claim to predict."""

    study: str
    predictions: Sequence[Prediction]
    sentences: Sequence[str]
    cautions: Sequence[str]


def check_on_study(directory: Path, *, group_size: int) -> PredictionSection:
    """What the study in a folder says of readiness's claim to predict."""
    study = load_study(directory)
    found = predict(study, group_size=group_size)
    return PredictionSection(
        study=study.name,
        predictions=found,
        sentences=prediction_sentences(found),
        cautions=prediction_cautions(study, found),
    )


def write_page(
    directory: Path,
    models: Sequence[ModelReadiness],
    prediction: PredictionSection | None,
    *,
    command: str,
) -> Path:
    """Write `readiness.html`, `readiness.json` and `figures/` into a folder; returns the page.

    Args:
        directory: where they go.
        models: in the order of the page; the first one's entropies set the threshold of forking tokens. May be empty where there is a
            prediction.
        prediction: of a study, or None.
        command: how the page was made.
    """
    pictures = directory / FIGURES_DIRECTORY
    figures = [
        *(draw_models(models) if models else []),
        *([draw_prediction(prediction.predictions)] if prediction else []),
    ]
    with disk_errors(pictures):
        pictures.mkdir(parents=True, exist_ok=True)
        sources = {figure.name: embed_picture(figure.save(pictures)) for figure in figures}
    write_json(directory / SUMMARY_FILE, plain_data(summarise(models, prediction, command)))
    template = template_environment([model.label for model in models]).get_template("readiness.html.j2")
    page = template.render(
        models=models,
        tasks=tasks_of(models),
        comparisons=[compare_models(models, task) for task in tasks_of(models)],
        task_tables=[_task_table(models, task) for task in tasks_of(models)],
        text_rows=text_rows(models) if models else [],
        fork_threshold=forking_shares(models)[0] if models else None,
        one_tokenizer=not models or share_one_tokenizer(models),
        figures=[
            {"figure": one, "source": sources[one.name], "file": f"{FIGURES_DIRECTORY}/{one.name}.png"}
            for one in figures
        ],
        prediction=prediction,
        min_signal=MIN_SIGNAL,
        decoding=models[0].result["decoding"] if models else None,
        command=command,
        number=_number,
    )
    write_atomically(directory / PAGE_FILE, page)
    return directory / PAGE_FILE


def describe_readiness(models: Sequence[ModelReadiness], prediction: PredictionSection | None) -> str:
    """Verdicts, advice and comparisons as lines of text."""
    lines: list[str] = []
    for task in tasks_of(models):
        lines += ["", f"GRPO with {models[0].tasks[task].group_size} samples a question"]
        lines += compare_models(models, task)
        for model in models:
            one = model.tasks[task]
            lines.append(f"  {verdict_sentence(model.label, one)}")
            lines += [f"    {advice}" for advice in one.advice]
    if models:
        lines += ["", "held-out text:"]
    for row in text_rows(models) if models else []:
        lines.append(
            f"  {row['label']}: {_number(row['bits_per_byte'], 3)} bits per byte, entropy {row['entropy_nats']:.3f} nats, "
            f"{row['fork_share']:.1%} forking, head mass {row['head_mass']:.3f}; worked solutions "
            f"{_number(row['solution_nats'], 3)} nats per token"
        )
    if prediction:
        lines += ["", f"over the runs of {prediction.study}:"]
        lines += [f"  {line}" for line in (*prediction.sentences, *prediction.cautions)]
    return "\n".join(lines[1:])


def summarise(
    models: Sequence[ModelReadiness], prediction: PredictionSection | None, command: str
) -> dict[str, Any]:
    """Every number and sentence as plain data; columns of single questions and documents stay in the runs' own files."""
    return {
        "command": command,
        "min_signal": MIN_SIGNAL,
        "models": [
            {
                "label": model.label,
                "num_parameters": model.result["num_parameters"],
                "decoding": model.result["decoding"],
                "text": {
                    name: value for name, value in model.result["text"].items() if "quantiles" not in name
                },
                "tasks": {name: dataclasses.asdict(one) for name, one in model.tasks.items()},
            }
            for model in models
        ],
        "text": text_rows(models) if models else [],
        "comparisons": [line for task in tasks_of(models) for line in compare_models(models, task)],
        "prediction": dataclasses.asdict(prediction) if prediction else None,
    }


def _number(value: float | None, decimals: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def _task_table(models: Sequence[ModelReadiness], task: str) -> dict[str, Any]:
    """Rows of one task, a model each."""

    def cell(one: Interval) -> dict[str, str]:
        return {
            "value": percent(one.value),
            "interval": f"{100 * one.low:.1f} to {100 * one.high:.1f}",
            "note": one.warning,
        }

    rows: list[dict[str, Any]] = []
    for model in models:
        one = model.tasks[task]
        rows.append(
            {
                "label": model.label,
                "one": one,
                "cells": [
                    cell(value)
                    for value in (one.signal_at_group_size, one.average, one.passed[one.num_samples])
                ],
                "shares": [
                    percent(share) for share in (one.never.value, one.sometimes.value, one.always.value)
                ],
                "form": [percent(one.ended), percent(one.readable)],
            }
        )
    return {"task": task, "one": models[0].tasks[task], "rows": rows}
