"""The study's figures, each with its caption and its description in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from rlprior.reports.curves import (
    Curve,
    guessing_curve,
    metric_curves,
    pass_curves,
    pool_sizes,
    rl_curves,
    score_curves,
    shared_documents,
    shared_questions,
    smooth,
    text_curves,
)
from rlprior.reports.drawing import (
    FAINT,
    INK,
    StudyFigure,
    add_legend,
    arm_styles,
    draw_curves,
    label_axes,
    new_figure,
    use_plain_log_axis,
    use_token_axis,
)
from rlprior.statistics.comparisons import Comparison, sentence
from rlprior.study.analysis import Analysis, TaskAnalysis
from rlprior.study.results import Study


def draw_figures(study: Study, analysis: Analysis) -> list[StudyFigure]:
    """Every figure for which the study has data, in the order of the report."""
    figures = [_draw_overview(study, analysis), _draw_text(study)]
    for task in analysis.tasks:
        figures += [_draw_scores(study, task), _draw_rl_scores(study, task)]
    figures.append(_draw_rl_dynamics(study))
    figures += [_draw_pass(study, task) for task in analysis.tasks]
    shown = [figure for figure in figures if figure is not None]
    for one in shown:
        one.figure.suptitle(one.title, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    return shown


def _chance_words(study: Study, unit: str) -> str:
    if len(study.seeds) > 1:
        so_far = " as far as finished" if study.missing else ""
        return f"Lines are means over {len(study.seeds)} seeds{so_far}, bands the range of seeds, bars 95% intervals over seeds."
    return f"Bars beside the last points are 95% intervals over {unit}."


def _describe_ends(study: Study, curves: Sequence[Curve], unit: str, digits: int = 2) -> str:
    """Where each arm's curve ends, in words."""
    labels = {arm.name: arm.label for arm in study.arms}
    ends = [f"{labels[curve.arm]} {curve.values[-1]:.{digits}f}" for curve in curves]
    return f"{', '.join(ends)}{unit}"


def _draw_text(study: Study) -> StudyFigure | None:
    perplexity = text_curves(study, "perplexity")
    if not perplexity:
        return None
    entropy = text_curves(study, "entropy")
    compared = len(study.arms) > 1
    figure, axes = new_figure(2, 2 if compared else 1, height=6.8 if compared else 3.8)
    panels: list[tuple[Axes, list[Curve], str, str]] = [
        (axes[0][0], perplexity, "Perplexity", "perplexity"),
        (axes[0][1], entropy, "Mean entropy of a prediction", "nats per token"),
    ]
    if compared:
        label = next(arm.label for arm in study.arms if arm.name == study.baseline)
        loss = text_curves(study, "cross_entropy", against_baseline=True)
        shift = text_curves(study, "entropy", against_baseline=True)
        panels += [
            (axes[1][0], loss, f"Log perplexity, minus that of {label}", "nats per token"),
            (axes[1][1], shift, f"Entropy, minus that of {label}", "nats per token"),
        ]
    for one, curves, title, unit in panels:
        draw_curves(one, study, curves)
        label_axes(one, title, "", unit)
        if title == "Perplexity":
            use_plain_log_axis(one, curves)
        use_token_axis(one, study)
    add_legend(figure, study, [curve.arm for curve in perplexity])
    number = len(shared_documents(study))
    return StudyFigure(
        name="fig1-2-perplexity-and-entropy",
        title="Perplexity and entropy over training tokens",
        caption=f"Top: how well each model predicts held-out text (left, lower is better) and how spread out its predictions are "
        f"(right). Bottom: the same as differences from the baseline arm, which the upper scale hides. The dashed line is the "
        f"start of mid-training. Measured on the {number} held-out documents that all checkpoints share. "
        f"{_chance_words(study, 'documents')} After Figures 1 and 2 of the paper.",
        alt=f"Curves over training tokens. Perplexity ends at {_describe_ends(study, perplexity, '')}. Entropy ends at "
        f"{_describe_ends(study, entropy, ' nats per token', 3)}.",
        figure=figure,
    )


def _draw_scores(study: Study, task: TaskAnalysis) -> StudyFigure | None:
    sizes = pool_sizes(study, task.name, ("pretrain", "midtrain"))
    if not sizes:
        return None
    k = sizes[0]
    average = score_curves(study, task.name, "avg", 1)
    passed = score_curves(study, task.name, "pass", k)
    figure, axes = new_figure(2, height=4.1)
    for one, curves, title in (
        (axes[0][0], average, "Avg@m: share of right answers"),
        (axes[0][1], passed, f"Pass@{k}"),
    ):
        draw_curves(one, study, curves)
        label_axes(one, title, "", "points (0 to 100)")
        use_token_axis(one, study)
    add_legend(figure, study, [curve.arm for curve in average])
    number = len(shared_questions(study, task.name))
    return StudyFigure(
        name=f"fig3-4-scores-{_file_word(task.name)}",
        title=f"Scores on {task.name} over training tokens",
        caption=f"Left: mean accuracy of one answer. Right: chance that at least one of {k} answers is right. Measured on the "
        f"{number} questions that all checkpoints share, so the table, which uses all questions, may differ a little. "
        f"{_chance_words(study, 'questions')} After Figures 3 and 4 of the paper.",
        alt=f"Curves over training tokens. Avg@m ends at {_describe_ends(study, average, ' points', 1)}. Pass@{k} ends at "
        f"{_describe_ends(study, passed, ' points', 1)}.",
        figure=figure,
    )


def _draw_rl_scores(study: Study, task: TaskAnalysis) -> StudyFigure | None:
    sizes = pool_sizes(study, task.name, ("rl",))
    if not sizes:
        return None
    k = sizes[0]
    average = rl_curves(study, task.name, "avg", 1)
    figure, axes = new_figure(3, height=4.1)
    draw_curves(axes[0][0], study, average)
    label_axes(axes[0][0], "Avg@m", "RL steps", "points (0 to 100)")
    for size in sizes:
        votes = rl_curves(study, task.name, "cons", 1, num_samples=size)
        draw_curves(axes[0][1], study, votes, joined=size == sizes[0])
    label_axes(axes[0][1], " and ".join(f"Cons@{size}" for size in sizes), "RL steps", "")
    passed = rl_curves(study, task.name, "pass", k)
    draw_curves(axes[0][2], study, passed)
    label_axes(axes[0][2], f"Pass@{k}", "RL steps", "")
    for one in axes[0]:
        one.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    add_legend(figure, study, [curve.arm for curve in average])
    number = len(shared_questions(study, task.name))
    two_pools = (
        f" A vote of more answers is another score: lines join checkpoints with {sizes[0]} samples, single hollow marks have "
        f"{' or '.join(map(str, sizes[1:]))}."
        if len(sizes) > 1
        else ""
    )
    return StudyFigure(
        name=f"fig5-6-rl-scores-{_file_word(task.name)}",
        title=f"Scores on {task.name} over reinforcement learning",
        caption=f"Step 0 is the model after mid-training. Avg: mean accuracy of one answer. Cons: majority vote. Pass@{k}: at least one "
        f"of {k} answers is right.{two_pools} Measured on the {number} questions that all checkpoints share. "
        f"{_chance_words(study, 'questions')} After Figures 5 and 6 of the paper.",
        alt=f"Curves over RL steps. Avg@m ends at {_describe_ends(study, average, ' points', 1)}. Pass@{k} ends at "
        f"{_describe_ends(study, passed, ' points', 1)}.",
        figure=figure,
    )


def _draw_rl_dynamics(study: Study) -> StudyFigure | None:
    panels = [
        ("entropy_nats", "Policy entropy", "nats per token"),
        ("response_tokens_mean", "Response length", "tokens"),
        ("reward_mean", "Training reward", "share of right answers"),
    ]
    found = [(metric_curves(study, name), title, unit) for name, title, unit in panels]
    found = [(curves, title, unit) for curves, title, unit in found if curves]
    if not found:
        return None
    styles = arm_styles(study)
    figure, axes = new_figure(len(found), height=4.1)
    for one, (curves, title, unit) in zip(axes[0], found, strict=True):
        for curve in curves:
            colour = styles[curve.arm].colour
            one.plot(curve.x, curve.values, color=colour, linewidth=0.7, alpha=0.28)
            few = {"marker": "o", "markersize": 4} if len(curve.x) < 10 else {}
            one.plot(curve.x, smooth(curve.values), color=colour, linewidth=1.9, **few)
        label_axes(one, title, "RL steps", unit)
        one.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    add_legend(figure, study, [curve.arm for curves, _, _ in found for curve in curves], markers=False)
    return StudyFigure(
        name="fig7-rl-dynamics",
        title="Entropy, response length and reward during reinforcement learning",
        caption="Logged on the training responses of each step; strong lines are running means over a tenth of the steps, faint lines "
        "the raw values"
        + (", both averaged over seeds" if len(study.seeds) > 1 else "")
        + ". A policy whose entropy falls to "
        "zero has stopped exploring. After Figure 7 of the paper, which has no reward panel.",
        alt="Curves over RL steps. "
        + " ".join(
            f"{title} ends at {_describe_ends(study, curves, ' ' + unit)}." for curves, title, unit in found
        ),
        figure=figure,
    )


def _draw_pass(study: Study, task: TaskAnalysis) -> StudyFigure | None:
    before = next((stage for stage in reversed(study.stages) if stage != "rl"), "")
    panels = [
        (pass_curves(study, task.name, stage), title)
        for stage, title in ((before, "Before RL"), ("rl", "After RL"))
    ]
    panels = [(curves, title) for curves, title in panels if curves]
    if not panels:
        return None
    styles = arm_styles(study)
    guesses = guessing_curve(study, task.name)
    figure, axes = new_figure(len(panels), height=4.3, sharey=True)
    for one, (curves, title) in zip(axes[0], panels, strict=True):
        for curve in curves:
            style = styles[curve.arm]
            one.plot(
                curve.x, curve.values, color=style.colour, marker=style.marker, markersize=4.5, linewidth=1.6
            )
            one.fill_between(curve.x, curve.low, curve.high, color=style.colour, alpha=0.1, linewidth=0)
        one.set_xscale("log", base=2)
        one.xaxis.set_major_locator(FixedLocator(curves[0].x))
        one.xaxis.set_minor_locator(NullLocator())
        one.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        label_axes(one, title, "k (log scale)", "Pass@k, points (0 to 100)" if one is axes[0][0] else "")
        if guesses is not None:
            one.plot(guesses.x, guesses.values, color=FAINT, linestyle=(0, (2, 2)), linewidth=1.6)
            one.annotate(
                "guessing",
                (guesses.x[-1], guesses.values[-1]),
                (-4, 4),
                textcoords="offset points",
                color=FAINT,
                ha="right",
            )
    values = [value for curves, _ in panels for curve in curves for value in curve.values]
    values += guesses.values if guesses else ()
    room = max(0.15 * (max(values) - min(values)), 5.0)
    # A band over two seeds can be wider than the page.
    axes[0][0].set_ylim(max(min(values) - room, -2.0), max(values) + room)
    add_legend(figure, study, [curve.arm for curves, _ in panels for curve in curves])
    unit = "seeds" if len(study.seeds) > 1 else "questions"
    return StudyFigure(
        name=f"fig8-pass-at-k-{_file_word(task.name)}",
        title=f"Pass@k over k on {task.name}",
        caption="Chance that at least one of k answers is right: the left end is precision, the right end is reach, the questions "
        f"that RL can learn from. Bands are pointwise 95% intervals over {unit}; bands that overlap may still hide a real difference, "
        "since arms are compared pair by pair in the tables."
        + (" Guessing: the k most frequent of all right answers, whatever the question." if guesses else "")
        + " After Figure 8 of the paper.",
        alt="Rising curves over k. "
        + " ".join(
            f"{title}, at the largest k: {_describe_ends(study, curves, ' points', 1)}."
            for curves, title in panels
        ),
        figure=figure,
    )


def _draw_overview(study: Study, analysis: Analysis) -> StudyFigure | None:
    label = next(arm.label for arm in study.arms if arm.name == study.baseline)
    panels: list[tuple[str, str, Sequence[Comparison]]] = [
        (
            f"Entropy\nbefore RL, minus {label}",
            "nats per token",
            analysis.likelihood_comparisons["entropy"],
        )
    ]
    task = analysis.main_task
    if task is not None:
        score = f"{task.score_label('avg')} on {task.name}"
        panels += [
            (f"What RL added to\n{score}", "points", task.rl_gains["avg"]),
            (f"{score}\nafter RL, minus {label}", "points", task.after["avg"]),
        ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    figure, axes = new_figure(len(panels), height=1.9 + 0.42 * len(study.arms), sharey=True)
    for one, (title, unit, comparisons) in zip(axes[0], panels, strict=True):
        _draw_forest(one, study, comparisons, with_baseline=title.endswith(f"minus {label}"))
        label_axes(one, title, unit, "")
    return StudyFigure(
        name="overview",
        title="The differences at a glance",
        caption="Dots are estimates, bars 95% intervals; a bar that crosses the vertical line at 0 is a difference that chance "
        "could explain. A filled dot is larger than chance also after correction for the number of comparisons in its panel.",
        alt=" ".join(sentence(one) for _, _, comparisons in panels for one in comparisons),
        figure=figure,
    )


def _draw_forest(axes: Axes, study: Study, comparisons: Sequence[Comparison], *, with_baseline: bool) -> None:
    rows = {arm.label: row for row, arm in enumerate(study.arms)}
    styles = {arm.label: arm_styles(study)[arm.name] for arm in study.arms}
    axes.axvline(0, color=FAINT, linewidth=1.2)
    for one in comparisons:
        arm = one.subject.removesuffix(" after RL")
        colour = styles[arm].colour
        axes.errorbar(
            [one.effect],
            [rows[arm]],
            xerr=[[one.effect - one.low], [one.high - one.effect]],
            color=colour,
            marker=styles[arm].marker,
            markersize=7,
            markerfacecolor=colour if one.decided_in_family else "white",
            linewidth=2,
            capsize=3,
        )
    if with_baseline:
        row = next(row for row, arm in enumerate(study.arms) if arm.name == study.baseline)
        axes.annotate(
            "reference",
            (0, row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=FAINT,
        )
    axes.set_yticks(list(rows.values()), list(rows), fontsize=10, color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def _file_word(name: str) -> str:
    """A task's name as part of a file name.

    >>> _file_word("GSM8K (test)")
    'gsm8k-test'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
