"""The report: one HTML file that needs nothing else, its pictures beside it, and every number as JSON."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from rlprior.reports.drawing import StudyFigure
from rlprior.reports.figures import draw_figures
from rlprior.runs.files import disk_errors, write_atomically, write_json
from rlprior.statistics.comparisons import Comparison, Interval, format_number, sentence, useful_decimals
from rlprior.study.analysis import SCORES, Analysis, ArmLikelihood, ArmScores, TaskAnalysis, analyse
from rlprior.study.claims import Answer, answer_question, format_count
from rlprior.study.results import STAGE_LABELS, Study, load_study
from rlprior.study.sanity import Check, check_study, dead_group_shares

FIGURES_DIRECTORY = "figures"
SUMMARY_FILE = "summary.json"


def write_report(study_directory: Path, output: Path) -> Path:
    """Write the report of a study, finished or not.

    Beside `output` go `summary.json`, with every number and sentence, and `figures/*.png`, the pictures that the page embeds.

    Args:
        study_directory: where `rlprior study` wrote.
        output: the HTML file.

    Returns:
        `output`.

    Raises:
        UsageError: `study_directory` holds no study.
        RunError: a file of the study is damaged, or the disk is full.
    """
    study = load_study(study_directory)
    analysis = analyse(study)
    checks = check_study(study, analysis)
    answer = answer_question(study, analysis, checks)
    figures = draw_figures(study, analysis)
    pictures = output.parent / FIGURES_DIRECTORY
    with disk_errors(pictures):
        pictures.mkdir(parents=True, exist_ok=True)
        sources = {figure.name: embed_picture(figure.save(pictures)) for figure in figures}
    write_json(output.parent / SUMMARY_FILE, summarise(study, analysis, answer, checks, figures))
    write_atomically(output, _render(study, analysis, answer, checks, figures, sources))
    return output


def _render(
    study: Study,
    analysis: Analysis,
    answer: Answer,
    checks: list[Check],
    figures: list[StudyFigure],
    sources: Mapping[str, str],
) -> str:
    labels = [arm.label for arm in study.arms]
    template = template_environment(labels).get_template("report.html.j2")
    return template.render(
        study=study,
        analysis=analysis,
        answer=answer,
        checks=checks,
        figures=[
            {"figure": one, "source": sources[one.name], "file": f"{FIGURES_DIRECTORY}/{one.name}.png"}
            for one in figures
        ],
        text_rows=[_text_row(study, analysis, row) for row in analysis.likelihood],
        task_tables=[_task_table(study, task) for task in analysis.tasks],
        rate_rows=_rate_rows(study, analysis),
        sentences=[sentence(one) for one in analysis.comparisons],
        settings={arm.name: describe_objective(arm.objective) for arm in study.arms},
        baseline=next(arm.label for arm in study.arms if arm.name == study.baseline),
        base_stage=STAGE_LABELS.get(analysis.base_stage or "", "training"),
        setup=_setup_rows(study),
        seconds={_STEP_LABELS.get(name, name): format_seconds(s) for name, s in study.wall_seconds.items()},
        config=json.dumps(study.config, indent=2, ensure_ascii=False) if study.config else "",
    )


_STEP_LABELS = {"data": "data", **STAGE_LABELS, "evaluate": "evaluation"}


def summarise(
    study: Study,
    analysis: Analysis,
    answer: Answer,
    checks: list[Check],
    figures: list[StudyFigure],
) -> dict[str, Any]:
    """Every number, interval and sentence of the report as plain data; an endless interval's end is None."""
    return plain_data(
        {
            "name": study.name,
            "baseline": study.baseline,
            "seeds": study.seeds,
            "arms": [dataclasses.asdict(arm) for arm in study.arms],
            "answer": dataclasses.asdict(answer),
            "missing": [dict(zip(("arm", "seed", "stage"), one, strict=True)) for one in study.missing],
            "base_stage": analysis.base_stage,
            "likelihood": [dataclasses.asdict(row) for row in analysis.likelihood],
            "tasks": [dataclasses.asdict(task) for task in analysis.tasks],
            "comparisons": [
                {**dataclasses.asdict(one), "sentence": sentence(one)} for one in analysis.comparisons
            ],
            "checks": [dataclasses.asdict(check) for check in checks],
            "dead_group_shares": dead_group_shares(study),
            "figures": [
                {
                    "file": f"{FIGURES_DIRECTORY}/{one.name}.png",
                    "title": one.title,
                    "caption": one.caption,
                    "alt": one.alt,
                }
                for one in figures
            ],
            "hardware": study.hardware,
            "versions": study.versions,
            "command": study.command,
            "wall_seconds": study.wall_seconds,
            "notes": study.notes,
        }
    )


def plain_data(value: Any) -> Any:
    """Data that JSON can hold: numbers without end become None."""
    if isinstance(value, Mapping):
        return {key: plain_data(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def template_environment(labels: list[str]) -> jinja2.Environment:
    """The pages' templates; the filter `keep_labels` keeps the spaces of these labels from breaking."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlprior.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def keep_labels(text: str) -> str:
        """Labels of objectives with spaces that do not break: "β = 0.5" stays on one line."""
        for label in labels:
            text = text.replace(label, label.replace(" ", "\N{NO-BREAK SPACE}"))
        return text

    environment.filters["keep_labels"] = keep_labels
    return environment


def embed_picture(path: Path) -> str:
    """A PNG as the source of an image that needs no file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


@dataclass(frozen=True)
class Cell:
    """One cell of a table: number, interval, and whether it is a difference larger than chance after correction."""

    value: str
    interval: str = ""
    real: bool = False
    note: str = ""


NOT_YET = Cell("–", "not finished")


def _interval_cell(one: Interval | None, *, signed: bool = False, min_decimals: int = 1) -> Cell:
    if one is None:
        return NOT_YET
    decimals = max(min_decimals, useful_decimals(one.low, one.high))
    return Cell(
        format_number(one.value, decimals, signed=signed),
        _ends(one.low, one.high, decimals, signed),
        note=one.warning,
    )


def _comparison_cell(one: Comparison | None) -> Cell:
    if one is None:
        return NOT_YET
    decimals = useful_decimals(one.low, one.high)
    return Cell(
        format_number(one.effect, decimals, signed=True),
        _ends(one.low, one.high, decimals, True),
        real=one.decided_in_family,
        note=one.warning,
    )


def _ends(low: float, high: float, decimals: int, signed: bool) -> str:
    return f"{format_number(low, decimals, signed=signed)} to {format_number(high, decimals, signed=signed)}"


def _against(comparisons: tuple[Comparison, ...], label: str, is_baseline: bool) -> Cell:
    if is_baseline:
        return Cell("reference")
    return _comparison_cell(next((one for one in comparisons if one.subject == label), None))


def _text_row(study: Study, analysis: Analysis, row: ArmLikelihood) -> dict[str, Any]:
    is_baseline = row.arm == study.baseline
    against = analysis.likelihood_comparisons
    return {
        "arm": row.arm,
        "label": row.label,
        "num_seeds": row.num_seeds,
        "cells": [
            _interval_cell(row.entropy, min_decimals=3),
            _against(against["entropy"], row.label, is_baseline),
            _interval_cell(row.perplexity, min_decimals=2),
            _against(against["cross_entropy"], row.label, is_baseline),
            _interval_cell(row.excess_entropy, signed=True),
            _against(against["excess_entropy"], row.label, is_baseline),
        ],
    }


def _task_table(study: Study, task: TaskAnalysis) -> dict[str, Any]:
    return {
        "task": task,
        "groups": [
            {
                "score": task.score_label(score),
                "rows": [_task_row(task, row, score, row.arm == study.baseline) for row in task.rows],
            }
            for score in SCORES
        ],
    }


def _task_row(task: TaskAnalysis, row: ArmScores, score: str, is_baseline: bool) -> dict[str, Any]:
    return {
        "label": row.label,
        "cells": [
            _interval_cell(row.before.get(score)),
            _interval_cell(row.after.get(score)),
            _comparison_cell(row.gain.get(score)),
            _against(task.after[score], row.label, is_baseline),
            _against(task.gain[score], row.label, is_baseline),
        ],
    }


def _rate_rows(study: Study, analysis: Analysis) -> list[dict[str, Any]]:
    dead = dead_group_shares(study)
    rows: list[dict[str, Any]] = []
    for text in analysis.likelihood:
        scores = [next(row for row in task.rows if row.arm == text.arm) for task in analysis.tasks]
        rows.append(
            {
                "label": text.label,
                "bits_per_byte": f"{text.bits_per_byte.value:.3f}" if text.bits_per_byte else "–",
                "head_mass": f"{100 * text.head_mass.value:.1f}%" if text.head_mass else "–",
                "truncated": [_before_after(one.truncated_share) for one in scores],
                "unparsable": [_before_after(one.unparsable_share) for one in scores],
                "dead_groups": f"{dead[text.arm]:.1%}" if text.arm in dead else "–",
            }
        )
    return rows


def _before_after(shares: tuple[float | None, float | None]) -> str:
    return " → ".join("–" if share is None else f"{share:.1%}" for share in shares)


_SETTING_NAMES = {
    "beta": "β",
    "head_reward": "head reward",
    "tail_reward": "tail reward",
    "top_k": "k",
    "smoothing": "ε",
    "gamma": "γ",
}


def describe_objective(objective: Mapping[str, Any]) -> str:
    r"""An objective's settings in words; a setting of 0 is off, and k only matters where head or tail are rewarded.

    >>> describe_objective({"name": "reward_shaping", "beta": -0.25, "head_reward": 0.0, "top_k": 100})
    'reward shaping, β\xa0−0.25'
    """
    rewarded = objective.get("head_reward") or objective.get("tail_reward")
    shown = [
        f"{_SETTING_NAMES.get(key, key)}\N{NO-BREAK SPACE}{str(value).replace('-', '−')}"
        for key, value in objective.items()
        if key != "name" and value != 0 and (key != "top_k" or rewarded)
    ]
    return ", ".join([str(objective.get("name", "")).replace("_", " "), *shown])


def _setup_rows(study: Study) -> dict[str, str]:
    """What a reader needs to repeat the study, as far as the study says."""
    model, hardware = study.model, study.hardware
    tokens = {
        stage: max(
            (c.tokens for run in study.runs.values() if run.stage == stage for c in run.checkpoints),
            default=0,
        )
        for stage in study.stages
    }
    steps = {
        stage: max(
            (c.step for run in study.runs.values() if run.stage == stage for c in run.checkpoints), default=0
        )
        for stage in study.stages
    }
    rows = {
        "Model": f"{format_count(model['num_parameters'])} parameters, {model['num_layers']} layers, width "
        f"{model['hidden_size']}, vocabulary {model['vocab_size']:,} ({model['preset']})"
        if model
        else "",
        "Training": "; ".join(
            f"{STAGE_LABELS[stage]} {steps[stage]:,} steps"
            + (f", up to token {tokens[stage]:,}" if stage != "rl" and tokens[stage] else "")
            for stage in study.stages
        ),
        "Seeds": ", ".join(map(str, study.seeds)),
        "Machine": _describe_machine(hardware),
        "Versions": ", ".join(f"{name} {version}" for name, version in study.versions.items()),
    }
    return {name: text for name, text in rows.items() if text}


def _describe_machine(hardware: Mapping[str, Any]) -> str:
    parts = [str(hardware["cpu"])] if hardware.get("cpu") else []
    if hardware.get("cores"):
        parts.append(f"{hardware['cores']} cores")
    if hardware.get("memory_bytes"):
        parts.append(f"{hardware['memory_bytes'] / 2**30:.0f} GiB of memory")
    return ", ".join([*parts, *map(str, hardware.get("gpus") or ())])


def format_seconds(seconds: float) -> str:
    """A duration in the unit that suits it.

    >>> format_seconds(48.2), format_seconds(310), format_seconds(7260)
    ('48 s', '5 min 10 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
