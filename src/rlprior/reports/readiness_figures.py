"""Readiness in pictures: models side by side, and what a study says of its claim to predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from rlprior.evaluation.judgement import MIN_SIGNAL, ModelReadiness, TaskReadiness, percent, tasks_of
from rlprior.reports.drawing import (
    BASELINE_COLOUR,
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    ArmStyle,
    StudyFigure,
    label_axes,
    new_figure,
)
from rlprior.statistics.intervals import Interval
from rlprior.study.prediction import LEVEL, Prediction

QUESTION_COLOURS = {
    "never right": "#b0b0b0",
    "sometimes right": "#0072B2",
    "always right": "#56B4E9",
}
RESPONSE_COLOURS = {
    "right": "#009E73",
    "wrong": "#E69F00",
    "no answer that can be read": "#D55E00",
    "cut": "#767676",
}


def _styles(models: Sequence[ModelReadiness]) -> list[ArmStyle]:
    colours = [BASELINE_COLOUR, *(COLOURS[i % len(COLOURS)] for i in range(len(models)))]
    return [ArmStyle(model.label, colours[i], MARKERS[i % len(MARKERS)]) for i, model in enumerate(models)]


def draw_models(models: Sequence[ModelReadiness]) -> list[StudyFigure]:
    """Pass@k, signal by group size, and how questions and responses split."""
    figures = [
        _draw_intervals(
            models,
            "signal",
            lambda one: dict(one.signal),
            title="Groups that carry a gradient, by their size",
            x="samples in a group (G)",
            y="signal@G",
            caption=f"Share of GRPO groups that hold both a right and a wrong answer. The dashed line is {MIN_SIGNAL:.0%}, below which more "
            f"than {1 / MIN_SIGNAL:.0f} groups are drawn for each that teaches. Bars are 95% intervals over questions.",
            threshold=MIN_SIGNAL,
        ),
        _draw_intervals(
            models,
            "pass",
            lambda one: dict(one.passed),
            title="Pass@k before RL",
            x="samples (k)",
            y="Pass@k",
            caption="Chance that at least one of k samples is right. Where the curve is flat, more samples find nothing new; its height at "
            "the right end is what making found answers more probable could reach. Bars are 95% intervals over questions.",
        ),
        _draw_splits(models),
    ]
    for one in figures:
        one.figure.suptitle(one.title, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    return figures


def _draw_intervals(
    models: Sequence[ModelReadiness],
    name: str,
    values_of: Callable[[TaskReadiness], dict[int, Interval]],
    *,
    title: str,
    x: str,
    y: str,
    caption: str,
    threshold: float | None = None,
) -> StudyFigure:
    """One panel a task: a quantity of each model over sizes, with its intervals."""
    tasks, styles = tasks_of(models), _styles(models)
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, axes = new_figure(columns, rows, height=0.9 + 3.1 * rows, sharey=True)
    panels: list[Axes] = [one for row in axes for one in row]
    ends: list[str] = []
    for panel, task in zip(panels, tasks, strict=False):
        for place, (model, style) in enumerate(zip(models, styles, strict=True)):
            values = values_of(model.tasks[task])
            shift = 1 + 0.05 * (place - (len(models) - 1) / 2)  # side by side on the logarithmic axis
            _draw_model(panel, values, style, shift)
            ends.append(f"{task}, {style.label}: {percent(list(values.values())[-1].value)} at {max(values)}")
        if threshold is not None:
            panel.axhline(threshold, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
        _use_size_axis(panel, list(values_of(models[0].tasks[task])))
        label_axes(panel, task, x, y if panel in [row[0] for row in axes] else "")
    for spare in panels[len(tasks) :]:
        spare.set_visible(False)
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker, markersize=5, linewidth=1.6, label=s.label)
        for s in styles
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False, fontsize=10
    )
    return StudyFigure(
        name=f"readiness-{name}",
        title=title,
        caption=caption,
        alt="; ".join(ends) + ".",
        figure=figure,
    )


def _draw_model(axes: Axes, values: dict[int, Interval], style: ArmStyle, shift: float) -> None:
    ones = list(values.values())
    axes.errorbar(
        [size * shift for size in values],
        [one.value for one in ones],
        yerr=[
            [max(0.0, one.value - one.low) for one in ones],
            [max(0.0, one.high - one.value) for one in ones],
        ],
        color=style.colour,
        marker=style.marker,
        markersize=4,
        linewidth=1.4,
        elinewidth=0.8,
    )


def _use_size_axis(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    shown = [size for size in sizes if len(sizes) < 7 or math.log2(size) % 2 < 1e-9 or size == sizes[-1]]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_splits(models: Sequence[ModelReadiness]) -> StudyFigure:
    """Two columns of stacked bars, a row a task: questions on the left, responses on the right."""
    tasks = tasks_of(models)
    height = 1.0 + len(tasks) * (0.7 + 0.27 * len(models))
    figure, axes = new_figure(2, len(tasks), height=height, sharex=True, sharey=True)
    words: list[str] = []
    for row, task in zip(axes, tasks, strict=True):
        questions = [_question_split(model.tasks[task]) for model in models]
        responses = [_response_split(model.tasks[task]) for model in models]
        for panel, splits, colours in (
            (row[0], questions, QUESTION_COLOURS),
            (row[1], responses, RESPONSE_COLOURS),
        ):
            _stack(panel, [model.label for model in models], splits, colours)
        label_axes(row[0], f"{task}: questions", "", "")
        label_axes(row[1], f"{task}: responses", "", "")
        for model, split in zip(models, questions, strict=True):
            words.append(
                f"{task}, {model.label}: " + ", ".join(f"{percent(v)} {k}" for k, v in split.items())
            )
    handles = [
        Patch(color=colour, label=name) for name, colour in {**QUESTION_COLOURS, **RESPONSE_COLOURS}.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
    return StudyFigure(
        name="readiness-splits",
        title="How questions and responses split",
        caption="Left: questions by how many of their samples are right; only those in the middle can teach. Right: what becomes of "
        "responses. Right and wrong ones state an answer; the others end without one, or are cut by the length limit before one.",
        alt="; ".join(words) + ".",
        figure=figure,
    )


def _question_split(one: TaskReadiness) -> dict[str, float]:
    return dict(zip(QUESTION_COLOURS, (one.never.value, one.sometimes.value, one.always.value), strict=True))


def _response_split(one: TaskReadiness) -> dict[str, float]:
    return dict(zip(RESPONSE_COLOURS, (one.average.value, *one.faults.values()), strict=True))


def _stack(
    axes: Axes, labels: Sequence[str], splits: Sequence[dict[str, float]], colours: dict[str, str]
) -> None:
    places = list(range(len(labels)))[::-1]
    lefts = [0.0] * len(labels)
    for name, colour in colours.items():
        widths = [split[name] for split in splits]
        axes.barh(places, widths, left=lefts, color=colour, height=0.72, edgecolor="white", linewidth=0.6)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_yticks(places, labels)
    axes.set_xlim(0, 1)
    axes.grid(False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def draw_prediction(predictions: Sequence[Prediction]) -> StudyFigure:
    """Rank correlations with their intervals, a panel an outcome of the first task."""
    task = predictions[0].task
    found = [one for one in predictions if one.task == task]
    outcomes = list(dict.fromkeys(one.outcome for one in found))
    names = list(dict.fromkeys(one.predictor for one in found))
    figure, axes = new_figure(len(outcomes), height=1.4 + 0.34 * len(names), sharey=True)
    for panel, outcome in zip(axes[0], outcomes, strict=True):
        for one in (one for one in found if one.outcome == outcome):
            place = len(names) - names.index(one.predictor)
            colour = COLOURS[0] if one.decided else FAINT
            panel.plot([one.low, one.high], [place, place], color=colour, linewidth=1.6)
            panel.plot([one.rho], [place], color=colour, marker="o", markersize=6)
        panel.axvline(0, color=INK, linewidth=0.8)
        panel.set_xlim(-1, 1)
        panel.set_yticks(range(len(names), 0, -1), names)
        label_axes(panel, outcome, "Spearman's rank correlation", "")
    title = f"What readiness predicts: {task}, {found[0].num_runs} runs"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    return StudyFigure(
        name="readiness-prediction",
        title=title,
        caption=f"Correlation, over the runs of the study (arms times seeds), of what was measured before RL with the score after it and with "
        f"what RL added. Bars are intervals at {found[0].level:.1%} ({LEVEL:.0%} corrected for {len(names)} predictors); blue ones leave out 0.",
        alt="; ".join(f"{one.outcome}, {one.predictor}: {one.rho:+.2f}" for one in found) + ".",
        figure=figure,
    )
