"""How often 95% intervals hold what they promise: coverage and width of each method over named difficulties, and so which one is used.

    python -m bench.intervals.run
    python -m bench.intervals.run --table

A question's difficulty is the chance that a sample answers it. In each trial, questions are drawn from a distribution of difficulties and
samples from the questions; an interval covers if it holds the true mean: of the distribution for "questions like these", of the trial's own
questions for the noise of sampling alone. Pairs are two models on the same questions, the second changed as named. Coverage of 95% over
4000 trials is measured to 0.35 points (one standard error). `--table` prints the tables of results/README.md from the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench.intervals.candidates import DIFFERENCES, NOISE, SCORES
from scipy import stats
from scipy.special import expit, logit

from rlprior.statistics.estimators import pass_at_k, pass_at_k_variance
from rlprior.statistics.intervals import Interval, difference_interval, sampling_interval, score_interval

FloatArray = npt.NDArray[np.float64]

CHOSEN = "invented ends (chosen)"
NUM_QUESTIONS = (30, 100, 500)
LEAST_COVERAGE = 0.93
DIFFICULTIES: dict[str, Any] = {
    "uniform": stats.uniform(),
    "U-shaped": stats.beta(0.2, 0.2),
    "bell": stats.beta(5, 5),
    "hard": stats.beta(0.3, 3),
    "nearly all wrong": stats.beta(0.3, 9.7),
    "nearly all right": stats.beta(9.7, 0.3),
    "all or nothing": stats.bernoulli(0.5),
    "rarely known": stats.bernoulli(0.03),
}
ESTIMANDS = {
    "accuracy": (1, 1),
    "Avg@16": (16, 1),
    "Avg@128": (128, 1),
    "Pass@8 of 16": (16, 8),
    "Pass@64 of 128": (128, 64),
}
PAIRED_DIFFICULTIES = ("uniform", "U-shaped", "nearly all wrong", "all or nothing", "rarely known")
PAIRED_ESTIMANDS = ("accuracy", "Avg@128", "Pass@64 of 128")
# share of the questions that change, and to what, given their difficulty and a fresh one
CHANGES: dict[str, tuple[float, Callable[[FloatArray, FloatArray], FloatArray]]] = {
    "same model": (0.0, lambda old, fresh: old),
    "all somewhat easier": (1.0, lambda old, fresh: expit(logit(np.clip(old, 1e-9, 1 - 1e-9)) + 0.7)),
    "5% drawn anew": (0.05, lambda old, fresh: fresh),
    "3% learnt": (0.03, lambda old, fresh: np.ones_like(old)),
    "unrelated": (1.0, lambda old, fresh: fresh),
}


def main() -> None:
    """Simulate all cells, or print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("results/intervals.json"))
    parser.add_argument("--table", action="store_true", help="print the tables of what --out holds, and stop")
    arguments = parser.parse_args()
    if not arguments.table:
        start = time.perf_counter()
        cells = [*simulate_scores(arguments.trials), *simulate_differences(arguments.trials)]
        cells += simulate_noise(arguments.trials)
        minutes = (time.perf_counter() - start) / 60
        head = {"level": 0.95, "trials": arguments.trials, "minutes": round(minutes, 1)}
        rows = ",\n  ".join(json.dumps(cell, ensure_ascii=False) for cell in cells)
        arguments.out.write_text(f'{json.dumps(head)[:-1]}, "cells": [\n  {rows}\n]}}\n')
    print_tables(json.loads(arguments.out.read_text())["cells"])


def simulate_scores(trials: int) -> Iterator[dict[str, Any]]:
    """One model's score over questions like these."""
    for n in NUM_QUESTIONS:
        for name, difficulty in DIFFICULTIES.items():
            for estimand, (m, k) in ESTIMANDS.items():
                random = np.random.default_rng([n, *name.encode(), m, k])
                chances = difficulty.rvs(size=(trials, n), random_state=random)
                values = _estimates(m, k)[random.binomial(m, chances)]
                truth = np.full(trials, _true_mean(_grid(name), k))
                ends = {label: method(values) for label, method in SCORES.items()}
                used = [score_interval(one) for one in values]
                yield _cell("score", name, estimand, n, truth, ends, used)


def simulate_differences(trials: int) -> Iterator[dict[str, Any]]:
    """Second model minus first over questions like these, paired."""
    for n in NUM_QUESTIONS:
        for name in PAIRED_DIFFICULTIES:
            for estimand in PAIRED_ESTIMANDS:
                for change, (share, become) in CHANGES.items():
                    m, k = ESTIMANDS[estimand]
                    random = np.random.default_rng([n, *name.encode(), m, k, *change.encode()])
                    old, fresh = DIFFICULTIES[name].rvs(size=(2, trials, n), random_state=random)
                    new = np.where(random.random(old.shape) < share, become(old * 1.0, fresh), old)
                    estimates = _estimates(m, k)
                    values = estimates[random.binomial(m, new)] - estimates[random.binomial(m, old)]
                    grid = _grid(name)
                    effect = share * (_true_mean(become(grid, grid), k) - _true_mean(grid, k))
                    ends = {label: method(values) for label, method in DIFFERENCES.items()}
                    used = [difference_interval(one) for one in values]
                    truth = np.full(trials, effect)
                    yield _cell("difference", f"{name}, {change}", estimand, n, truth, ends, used)


def simulate_noise(trials: int) -> Iterator[dict[str, Any]]:
    """One model's score on these very questions."""
    for n in NUM_QUESTIONS:
        for name, difficulty in DIFFICULTIES.items():
            for estimand, (m, k) in ESTIMANDS.items():
                if m < 2 * k:
                    continue
                random = np.random.default_rng([n, *name.encode(), m, k, 1])
                chances = difficulty.rvs(size=(trials, n), random_state=random)
                correct = random.binomial(m, chances)
                mean = _estimates(m, k)[correct].mean(1)
                error = np.sqrt(pass_at_k_variance(m, np.arange(m + 1), k)[correct].sum(1)) / n
                ends = {label: method(mean, error, n * m / k) for label, method in NOISE.items()}
                used = [sampling_interval(m, one, k) for one in correct]
                truth = (1 - (1 - chances) ** k).mean(1)
                yield _cell("noise", name, estimand, n, truth, ends, used)


def _estimates(m: int, k: int) -> FloatArray:
    """Estimate of each count of correct samples."""
    return pass_at_k(m, np.arange(m + 1), k)


def _true_mean(chances: FloatArray, k: int) -> float:
    return float((1 - (1 - chances) ** k).mean())


@functools.lru_cache
def _grid(name: str) -> FloatArray:
    """The distribution's quantiles at 100 000 even steps: the mean of a monotone function of them is off by 1e-5 at most."""
    return DIFFICULTIES[name].ppf((np.arange(100_000) + 0.5) / 100_000).astype(float)


def _cell(
    of: str,
    difficulty: str,
    estimand: str,
    n: int,
    truth: FloatArray,
    ends: dict[str, tuple[FloatArray, FloatArray]],
    used: list[Interval],
) -> dict[str, Any]:
    lows, highs = (np.array([getattr(one, end) for one in used]) for end in ("low", "high"))
    methods = {}
    for label, (low, high) in {CHOSEN: (lows, highs), **ends}.items():
        # differences of equal models have a true mean of exactly 0, which rounding must not push out
        covered = (low <= truth + 1e-9) & (truth - 1e-9 <= high)
        methods[label] = [round(float(covered.mean()), 4), round(float((high - low).mean()), 5)]
    cell = {
        "of": of,
        "difficulty": difficulty,
        "estimand": estimand,
        "num_questions": n,
        "truth": round(float(truth.mean()), 5),
        "coverage_and_width": methods,
    }
    if methods[CHOSEN][0] < LEAST_COVERAGE:
        cell["warned"] = round(float(np.mean([bool(one.warning) for one in used])), 4)
    print(of, difficulty, estimand, n, methods[CHOSEN], flush=True)
    return cell


def print_tables(cells: list[dict[str, Any]]) -> None:
    """Every method's least coverage and mean width, and where the chosen ones fall short."""
    for of, title in {
        "score": "A score over questions like these",
        "difference": "The difference between two models, paired by question",
        "noise": "The noise of sampling, these questions",
    }.items():
        group = [cell for cell in cells if cell["of"] == of]
        print(
            f"\n| {title} | "
            + " | ".join(f"{n} questions: least, below 93%, width" for n in NUM_QUESTIONS)
            + " |"
        )
        print("|---|" + "---|" * len(NUM_QUESTIONS))
        for label in group[0]["coverage_and_width"]:
            row = [
                _summary([cell for cell in group if cell["num_questions"] == n], label) for n in NUM_QUESTIONS
            ]
            print(f"| {label} | " + " | ".join(row) + " |")
    print("\n| chosen, score | " + " | ".join(f"{n} questions: coverage" for n in NUM_QUESTIONS) + " |")
    print("|---|" + "---|" * len(NUM_QUESTIONS))
    for name in DIFFICULTIES:
        spans = []
        for n in NUM_QUESTIONS:
            found = [
                cell["coverage_and_width"][CHOSEN][0]
                for cell in cells
                if (cell["of"], cell["difficulty"], cell["num_questions"]) == ("score", name, n)
            ]
            spans.append(f"{100 * min(found):.1f} to {100 * max(found):.1f}")
        print(f"| {name} | " + " | ".join(spans) + " |")
    short = [cell for cell in cells if cell["coverage_and_width"][CHOSEN][0] < LEAST_COVERAGE]
    print("\nchosen ones below 93%:")
    for cell in short:
        coverage = cell["coverage_and_width"][CHOSEN][0]
        print(
            f"- {cell['of']}, {cell['difficulty']}, {cell['estimand']}, {cell['num_questions']} questions: "
            f"{100 * coverage:.1f}%, warned in {cell['warned']:.0%}, true mean {100 * cell['truth']:.1f} points"
        )


def _summary(cells: list[dict[str, Any]], label: str) -> str:
    coverages = [cell["coverage_and_width"][label][0] for cell in cells]
    width = np.mean([cell["coverage_and_width"][label][1] for cell in cells])
    below = sum(coverage < LEAST_COVERAGE for coverage in coverages)
    return f"{100 * min(coverages):.1f}, {below} of {len(cells)}, {100 * width:.1f}"


if __name__ == "__main__":
    main()
