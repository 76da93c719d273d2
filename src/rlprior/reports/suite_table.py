"""The table of a suite: scores with their intervals, what became of the answers, and the paper's averages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlprior.evaluation.suite import RESULTS_FILE
from rlprior.runs.files import write_atomically
from rlprior.statistics.estimators import avg_at_m, pass_at_k
from rlprior.statistics.intervals import score_interval
from rlprior.tasks.benchmarks.suites import BENCHMARKS, SUITES, category_averages
from rlprior.tasks.problem import UNGRADED

TABLE_FILE = "results.md"
PASS_K = 64
"""Pass@64, as in the paper; of fewer samples as many as there are."""


def write_table(directory: Path) -> str:
    """Write `results.md` from `results.json`, and return it."""
    results = json.loads((directory / RESULTS_FILE).read_text(encoding="utf-8"))
    text = describe_results(results)
    write_atomically(directory / TABLE_FILE, text + "\n")
    return text


def describe_results(results: dict[str, Any]) -> str:
    """A Markdown table of the benchmarks, then the averages, then what to know of them."""
    suite, benchmarks = SUITES[results["suite"]], results["benchmarks"]
    scores = {name: scores_of(one) for name, one in benchmarks.items()}
    rows = [_row(one, scores[name]) for name, one in benchmarks.items()]
    decoding = results["decoding"]
    lines = [
        f"{suite.name}: {suite.title}; {results['model']}",
        "",
        *_table(
            (
                "category",
                "benchmark",
                "shots",
                "questions",
                "accuracy",
                "Pass@k",
                "Cons@m",
                "cut",
                "no answer",
            ),
            rows,
        ),
        "",
    ]
    counted = {entry.benchmark: entry.pass_k for entry in suite.entries}
    means = {name: _counted_score(one, scores[name], counted[name]) for name, one in benchmarks.items()}
    averages = category_averages(means, suite)
    if all(average.value is None for average in averages.values()):
        lines.append("- No average: each needs benchmarks of the suite that are not here.")
    else:
        for title, average in averages.items():
            value = (
                f"none without {_list(average.missing)}"
                if average.value is None
                else f"{100 * average.value:.2f}"
            )
            lines.append(f"- {title}: {value}")
    lines += [
        "",
        f"Sampled at temperature {decoding['temperature']:g} and top-p {decoding['top_p']:g}; accuracy is Avg@m, in percent, or that of the likeliest choice; "
        "in brackets its 95% interval over questions like these; Pass@k and Cons@m are of the samples; cut: at the length limit; no answer: of those that ended.",
    ]
    has_average = any(average.value is not None for average in averages.values())
    for k in sorted({k for name in benchmarks if has_average and (k := counted[name])}):
        titles = [one["title"] for name, one in benchmarks.items() if counted[name] == k]
        fewest = min(one["num_samples"] for name, one in benchmarks.items() if counted[name] == k)
        want = (
            f" for want of the {k} samples of the paper's Pass@{k}" if fewest < k else ", as the paper's do"
        )
        lines.append(f"The averages count Pass@{min(k, fewest)} of {', '.join(titles)}{want}.")
    lines += [line for one in benchmarks.values() for line in _losses(one)]
    warnings: dict[str, list[str]] = {}
    for name, values in scores.items():
        warnings.setdefault(score_interval(values).warning, []).append(benchmarks[name]["title"])
    lines += [f"{', '.join(titles)}: {warning}." for warning, titles in warnings.items() if warning]
    if results["missing"]:
        titles = ", ".join(BENCHMARKS[name].title for name in results["missing"])
        lines.append(
            f"Not asked for want of data: {titles}; {RESULTS_FILE} has the file or command that gives each."
        )
    return "\n".join(lines)


def _counted_score(benchmark: dict[str, Any], scores: np.ndarray, k: int | None) -> float:
    """What an average counts: accuracy, or Pass@k of as many samples as there are."""
    if k is None:
        return float(scores.mean())
    m = benchmark["num_samples"]
    return float(pass_at_k(m, np.array(benchmark["num_correct"]), min(k, m)).mean())


def _losses(benchmark: dict[str, Any]) -> list[str]:
    """What counts as wrong for other reasons than an answer, or was asked without its beginning."""
    title, num_answers = benchmark["title"], benchmark["num_samples"] * len(benchmark["num_correct"])
    found = []
    for status in UNGRADED:
        if count := sum(benchmark.get(f"num_{status}", ())):
            found.append(
                f"{title}: {count} of {num_answers} answers {status.replace('_', ' ')} and count as wrong."
            )
    if num_cut := sum(map(bool, benchmark.get("num_cut", ()))):
        found.append(
            f"{title}: {num_cut} of {len(benchmark['num_cut'])} prompts lost their beginning, for want of positions in the model."
        )
    return found


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 6 else f"{len(names)} benchmarks that are missing"


def scores_of(benchmark: dict[str, Any]) -> np.ndarray:
    """Avg@m of each question, in [0, 1]; of a likelihood benchmark 0 or 1."""
    return avg_at_m(benchmark["num_samples"], np.array(benchmark["num_correct"]))


def _row(benchmark: dict[str, Any], scores: np.ndarray) -> tuple[str, ...]:
    interval, m = score_interval(scores), benchmark["num_samples"]
    row = [
        benchmark["category"],
        benchmark["title"],
        str(benchmark["num_shots"]),
        str(len(scores)),
        f"{100 * interval.value:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})",
    ]
    if benchmark["metric"] == "likelihood":
        return (*row, "", "", "", "")
    k, total = min(PASS_K, m), m * len(scores)
    passed = pass_at_k(m, np.array(benchmark["num_correct"]), k).mean()
    votes = benchmark["consensus"]
    return (
        *row,
        f"{100 * passed:.1f} @{k}",
        f"{100 * np.mean(votes):.1f} @{m}" if votes else "",
        f"{sum(benchmark['num_truncated']) / total:.1%}",
        f"{sum(benchmark['num_unparsable']) / total:.1%}",
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = [
        [title.ljust(width) for title, width in zip(titles, widths, strict=True)],
        ["-" * width for width in widths],
    ]
    lines += [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
