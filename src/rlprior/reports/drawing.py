"""How figures look: one style an arm, axes, legends, curves with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from rlprior.reports.curves import Curve, stage_boundaries
from rlprior.study.results import STAGE_LABELS, Study

WIDTH_INCHES = 9.0
DOTS_PER_INCH = 160
INK = "#222222"
FAINT = "#767676"
# Okabe and Ito's palette, told apart under every common colour blindness; the baseline arm is black.
BASELINE_COLOUR = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True, kw_only=True)
class StudyFigure:
    """A figure with its words.

    Attributes:
        name: file name without ending.
        title: what is shown.
        caption: how to read it, and the paper's figure that it follows.
        alt: what a reader who cannot see it would need to know.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure

    def save(self, directory: Path) -> Path:
        """Write `<name>.png`; returns its path."""
        path = directory / f"{self.name}.png"
        self.figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
        return path


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn, in every figure."""

    label: str
    colour: str
    marker: str


def arm_styles(study: Study) -> dict[str, ArmStyle]:
    """Colour and marker of each arm, by its place in the study."""
    others = [arm for arm in study.arms if arm.name != study.baseline]
    colours = {arm.name: COLOURS[i % len(COLOURS)] for i, arm in enumerate(others)}
    colours[study.baseline] = BASELINE_COLOUR
    return {
        arm.name: ArmStyle(arm.label, colours[arm.name], MARKERS[i % len(MARKERS)])
        for i, arm in enumerate(study.arms)
    }


def new_figure(
    columns: int, rows: int = 1, *, height: float, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of the report's width with its panels, by row and column."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # type: ignore[union-attr]
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(FAINT)
        one.tick_params(colors=INK, labelsize=9.5)
        one.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes.tolist()


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title of a panel and names of its axes, units included."""
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)


def add_legend(figure: Figure, study: Study, arms: Iterable[str], *, markers: bool = True) -> None:
    """One legend under all panels, in the order of the arms."""
    shown = set(arms)
    handles = [
        Line2D(
            [],
            [],
            color=style.colour,
            marker=style.marker if markers else "",
            markersize=5,
            linewidth=1.8,
            label=style.label,
        )
        for name, style in arm_styles(study).items()
        if name in shown
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=10
    )


def draw_curves(axes: Axes, study: Study, curves: Sequence[Curve], *, joined: bool = True) -> None:
    """Line with markers, band over seeds where there are several, and the last point's interval, arms side by side."""
    styles = arm_styles(study)
    reach = max((curve.x[-1] for curve in curves), default=1.0) - min(
        (curve.x[0] for curve in curves), default=0.0
    )
    finished = [curve.arm for curve in curves if curve.last]
    for curve in curves:
        style = styles[curve.arm]
        axes.plot(
            curve.x,
            curve.values,
            linestyle="-" if joined else "none",
            color=style.colour,
            marker=style.marker,
            markersize=4.5 if joined else 6,
            markerfacecolor=style.colour if joined else "white",
            linewidth=1.6,
        )
        if joined and curve.low != curve.values:
            axes.fill_between(curve.x, curve.low, curve.high, color=style.colour, alpha=0.13, linewidth=0)
        if curve.last and math.isfinite(curve.last.low + curve.last.high):
            # Intervals of several arms at one place would cover each other: they stand beside the last point, in arm order.
            place = curve.x[-1] + reach * (0.05 + 0.022 * finished.index(curve.arm))
            draw_interval(axes, place, curve.last.value, curve.last.low, curve.last.high, style)


def draw_interval(axes: Axes, x: float, value: float, low: float, high: float, style: ArmStyle) -> None:
    """A value with its interval as a vertical bar."""
    axes.errorbar(
        [x],
        [value],
        yerr=[[value - low], [high - value]],
        color=style.colour,
        linewidth=1.4,
        capsize=2,
        marker=style.marker,
        markersize=3,
    )


def use_token_axis(axes: Axes, study: Study) -> None:
    """Ticks in thousands, millions or billions of tokens, and the stages named between their boundaries."""
    boundaries = stage_boundaries(study)
    largest = max((end for _, _, end in boundaries), default=1.0)
    scale, unit = next(
        ((s, u) for s, u in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")) if largest >= 2 * s),
        (1.0, ""),
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / scale:g}"))
    axes.set_xlabel(f"training tokens ({unit})" if unit else "training tokens", fontsize=10, color=INK)
    left, right = axes.get_xlim()
    for stage, start, end in boundaries:
        if start:
            axes.axvline(start, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
        if len(boundaries) > 1:
            axes.text(
                (max(start, left) + min(end, right)) / 2,
                1.0,
                STAGE_LABELS[stage],
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=9,
                color=FAINT,
            )
    low, high = axes.get_ylim()
    if len(boundaries) > 1 and axes.get_yscale() == "linear":
        axes.set_ylim(low, high + 0.1 * (high - low))
    elif len(boundaries) > 1:
        axes.set_ylim(low, high * (high / low) ** 0.1)


def use_plain_log_axis(axes: Axes, curves: Sequence[Curve]) -> None:
    """Logarithmic y with round numbers as ticks, where the values span more than a factor of 3."""
    values = [value for curve in curves for value in curve.values]
    if min(values) <= 0 or max(values) / min(values) < 3:
        return
    axes.set_yscale("log")
    ticks = [factor * 10.0**power for power in range(-3, 7) for factor in (1, 2, 3, 5)]
    axes.yaxis.set_major_locator(
        FixedLocator([t for t in ticks if min(values) / 1.5 <= t <= max(values) * 1.5])
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
