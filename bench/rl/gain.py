"""What reinforcement learning did to one arm of a study: held-out accuracy before and after with its interval, and what came beside it.

    python -m bench.rl.gain runs/rl-200-0 runs/rl-200-1 runs/rl-200-2 --arm ce --out results/rl-200-steps/refill.json

The folders are those of studies of different seeds; results/README.md has the commands of `rl-200-steps`.

Intervals are Student's t over seeds, as in the report; with three seeds they are wide.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from scipy import stats

from rlprior.evaluation.record import Record
from rlprior.statistics.estimators import pass_at_k
from rlprior.study.results import Study, load_study

LEVEL = 0.95


def main() -> None:
    """Print the table, and write it with every seed's numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", type=Path, nargs="+", help="what `rlprior study` wrote")
    parser.add_argument("--arm", default="ce")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    studies = [load_study(directory) for directory in arguments.directories]
    pairs = [(study, seed) for study in studies for seed in study.seeds]
    if len(pairs) < 2 or len({seed for _, seed in pairs}) < len(pairs):
        raise SystemExit("an interval over seeds needs two seeds or more, each of them once")
    before, after = (
        [measure(_final(study, arguments.arm, seed, stage), arguments.task) for study, seed in pairs]
        for stage in ("midtrain", "rl")
    )
    rows = {
        name: {
            "before": [one[name] for one in before],
            "after": [one[name] for one in after],
            "change": interval([late[name] - early[name] for early, late in zip(before, after, strict=True)]),
        }
        for name in before[0]
    }
    runs = [study.runs[arguments.arm, seed, "rl"].metrics for study, seed in pairs]
    training = {
        name: {
            "first ten steps": [_mean(run[:10], name) for run in runs],
            "last ten steps": [_mean(run[-10:], name) for run in runs],
        }
        for name in ("reward_mean", "entropy_nats", "response_tokens_mean", "dead_group_share")
    }
    for name, row in rows.items():
        change = row["change"]
        print(
            f"| {name} | {_span(row['before'])} | {_span(row['after'])} | "
            f"{change['value']:+.3g} ({change['low']:+.3g} to {change['high']:+.3g}) |"
        )
    for name, row in training.items():
        print(f"| training {name} | {_span(row['first ten steps'])} | {_span(row['last ten steps'])} | |")
    if arguments.out:
        first = studies[0]
        report = {
            "commands": [study.command for study in studies],
            "hardware": first.hardware,
            "versions": first.versions,
            "seeds": [seed for _, seed in pairs],
            "rl": first.config["rl"],
            "midtrain": {seed: study.config["midtrain"] for study, seed in pairs},
            "held_out": rows,
            "training": training,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def _final(study: Study, arm: str, seed: int, stage: str) -> Record:
    found = study.final(arm, seed, stage)
    if found is None:
        raise SystemExit(
            f"the {stage} evaluation of {arm}, seed {seed}, is missing; run the study to its end"
        )
    return found


def measure(checkpoint: Record, task: str) -> dict[str, float]:
    """Of held-out problems, shares in points; entropy of the text in nats a token; response length in tokens."""
    scores, likelihood = checkpoint.tasks[task], checkpoint.likelihood
    assert likelihood is not None
    num_samples = scores.num_samples * len(scores.num_correct)
    num_passed = [
        pass_at_k(scores.num_samples, int(correct), scores.num_samples) for correct in scores.num_correct
    ]
    return {
        f"Avg@{scores.num_samples}, points": 100 * float(scores.num_correct.sum()) / num_samples,
        f"Pass@{scores.num_samples}, points": 100 * statistics.fmean(num_passed),
        "answer in the expected form, points": 100
        * (1 - float((scores.num_unparsable.sum() + scores.num_truncated.sum()) / num_samples)),
        "response tokens": float(scores.num_tokens.sum()) / num_samples,
        "entropy on held-out text, nats": float(likelihood.entropy_nats.sum() / likelihood.num_tokens.sum()),
    }


def interval(changes: list[float]) -> dict[str, float]:
    """Mean over seeds with its 95% interval."""
    value = statistics.fmean(changes)
    half = (
        float(stats.t.ppf(0.5 + LEVEL / 2, len(changes) - 1))
        * statistics.stdev(changes)
        / len(changes) ** 0.5
    )
    return {"value": value, "low": value - half, "high": value + half, "level": LEVEL, "seeds": len(changes)}


def _mean(records: Any, name: str) -> float:
    return statistics.fmean(record[name] for record in records if name in record)


def _span(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


if __name__ == "__main__":
    main()
