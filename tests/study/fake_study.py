"""Write a study directory with planted effects: what the report reads, without training anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TOKENS_PER_STEP = 1024
STEPS = {"pretrain": (100, 200, 300, 400), "midtrain": (75, 150, 225, 300), "rl": (20, 40, 60, 80)}


@dataclass(frozen=True)
class Effect:
    """What an objective truly does.

    Args:
        label, objective: how the arm is called and set.
        entropy_nats: added to the entropy of every token.
        cross_entropy_nats: added to the cross-entropy of every token.
        ability: added to the log-odds of a right answer before RL.
        rl_gain: what RL adds to the log-odds.
    """

    label: str
    objective: Mapping[str, Any]
    entropy_nats: float = 0.0
    cross_entropy_nats: float = 0.0
    ability: float = 0.0
    rl_gain: float = 0.45


CE = Effect("cross-entropy", {"name": "cross_entropy"})
PAPER_ARMS: dict[str, Effect] = {
    "ce": CE,
    "beta_low": Effect(
        "β = -0.25",
        {"name": "reward_shaping", "beta": -0.25, "head_reward": 0.0, "tail_reward": 0.0, "top_k": 100},
        -0.06,
        0.004,
        0.05,
        0.6,
    ),
    "beta_high": Effect("β = 0.5", {"name": "reward_shaping", "beta": 0.5}, 0.09, 0.006, -0.1, 0.25),
    "tail": Effect("tail -0.1", {"name": "reward_shaping", "tail_reward": -0.1, "top_k": 100}, -0.02, 0.02),
    "head": Effect(
        "head 0.1", {"name": "reward_shaping", "head_reward": 0.1, "top_k": 100}, 0.004, 0.0, 0.02
    ),
}
SAME_ARMS = {"ce": CE, "same": Effect("the same again", {"name": "reward_shaping"})}


@dataclass(frozen=True)
class Size:
    """How much is evaluated: at a stage's last checkpoint, and at the others."""

    documents: int = 120
    questions: int = 240
    samples: int = 16
    intermediate_documents: int = 60
    intermediate_questions: int = 100
    intermediate_samples: int = 8


SMALL = Size(
    documents=40,
    questions=40,
    samples=4,
    intermediate_documents=20,
    intermediate_questions=20,
    intermediate_samples=2,
)
"""Enough to exercise every part of a report, and no more."""


def make_fake_study(
    directory: Path,
    arms: Mapping[str, Effect] = PAPER_ARMS,
    seeds: Sequence[int] = (0,),
    *,
    size: Size = Size(),
    tasks: Sequence[str] = ("arithmetic",),
    seed_noise: float = 0.0,
    unfinished: Sequence[tuple[str, int, str]] = (),
    chance: int = 0,
) -> Path:
    """Write the study; returns its directory.

    Args:
        directory: where; made if need be.
        arms: name -> effect; the first is the baseline.
        seeds: training seeds.
        size: how much is evaluated.
        tasks: names of the tasks.
        seed_noise: standard deviation, over seeds and arms, added to entropy (nats) and ability (log-odds).
        unfinished: (arm, seed, stage) whose last evaluation is not there yet; "pretrain" leaves the whole run out.
        chance: seed of all random numbers.
    """
    random = np.random.default_rng(chance)
    world = _World(random, size, tasks)
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        for name, effect in arms.items():
            luck = seed_noise * random.standard_normal(2)
            for stage in STEPS:
                run = f"runs/{stage}-{name}-s{seed}"
                runs.append(
                    {"arm": name, "seed": seed, "stage": stage, "directory": run, "evaluation": f"{run}/eval"}
                )
                kept = None if (name, seed, stage) not in unfinished else 0 if stage == "pretrain" else 2
                records = [world.evaluate(effect, luck, stage, step) for step in STEPS[stage]][:kept]
                _write_records(directory / run / "eval" / "results.jsonl", records)
                _write_records(directory / run / "metrics.jsonl", world.log(effect, stage)[:kept])
    study = {
        "name": "A study that never ran",
        "arms": [{"name": n, "label": e.label, "objective": e.objective} for n, e in arms.items()],
        "baseline": next(iter(arms)),
        "seeds": list(seeds),
        "runs": runs,
        "model": {
            "preset": "tiny",
            "num_layers": 3,
            "hidden_size": 128,
            "vocab_size": 1024,
            "num_parameters": 651_776,
        },
        "hardware": {"cpu": "An Imaginary Processor", "cores": 2, "memory_bytes": 8 * 2**30, "gpus": []},
        "versions": {"rlprior": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
        "command": "rlprior study imaginary.toml --seeds 0",
        "wall_seconds": {"data": 11.0, "pretrain": 310.0, "midtrain": 290.0, "rl": 420.0, "evaluate": 200.0},
        "notes": ["Generated numbers: <b>nothing</b> was trained & nothing was learned."],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "study.json").write_text(json.dumps(study))
    return directory


class _World:
    """Documents and questions that all arms meet."""

    def __init__(self, random: np.random.Generator, size: Size, tasks: Sequence[str]) -> None:
        self.random, self.size, self.tasks = random, size, tasks
        self.lengths = np.maximum(20, 400 * random.lognormal(0, 0.5, size.documents)).astype(int)
        self.nats = random.normal(2.3, 0.25, size.documents)
        self.difficulty = random.normal(0.0, 1.2, size.questions)

    def evaluate(self, effect: Effect, luck: np.ndarray, stage: str, step: int) -> dict[str, Any]:
        final = step == STEPS[stage][-1]
        tokens = _tokens(stage, step)
        return {
            "stage": stage,
            "step": step,
            "tokens": tokens,
            "final": final,
            "likelihood": self._likelihood(effect, luck[0], tokens, final),
            "tasks": {
                name: self._answers(effect, luck[1] - 0.5 * number, stage, step, final)
                for number, name in enumerate(self.tasks)
            },
        }

    def _likelihood(self, effect: Effect, luck: float, tokens: int, final: bool) -> dict[str, Any]:
        chosen = np.arange(self.size.documents)[:: 1 if final else 2][
            : self.size.documents if final else self.size.intermediate_documents
        ]
        lengths = self.lengths[chosen]
        early = 2.2 * math.exp(-tokens / 200_000)

        def noise() -> np.ndarray:
            return 0.03 * self.random.standard_normal(len(chosen))

        cross_entropy = self.nats[chosen] + early + effect.cross_entropy_nats + noise()
        entropy = self.nats[chosen] + 0.9 * early - 0.02 + effect.entropy_nats + luck + noise()
        return {
            "document_ids": [f"english/{i}" for i in chosen],
            "num_tokens": lengths.tolist(),
            "num_bytes": (3 * lengths).tolist(),
            "cross_entropy_nats": (lengths * cross_entropy).tolist(),
            "entropy_nats": (lengths * entropy).tolist(),
            "head_mass": (lengths * 0.97).tolist(),
            "unigram_cross_entropy_nats": (lengths * 5.4).tolist(),
        }

    def _answers(self, effect: Effect, luck: float, stage: str, step: int, final: bool) -> dict[str, Any]:
        size = self.size
        chosen = np.arange(size.questions if final else size.intermediate_questions)
        m = size.samples if final else size.intermediate_samples
        progress = step / STEPS[stage][-1]
        ability = {
            "pretrain": -3.5 + progress,
            "midtrain": -2.5 + 2.1 * progress + effect.ability * progress,
            "rl": -0.4 + effect.ability + effect.rl_gain * progress,
        }[stage]
        chance = 1 / (1 + np.exp(self.difficulty[chosen] - ability - luck))
        correct = self.random.binomial(m, chance)
        return {
            "problem_ids": [f"q{i}" for i in chosen],
            "num_samples": m,
            "num_correct": correct.tolist(),
            "consensus": (correct > 0.35 * m).astype(float).tolist(),
            "num_truncated": self.random.binomial(m, 0.02, len(chosen)).tolist(),
            "num_unparsable": self.random.binomial(m, 0.05, len(chosen)).tolist(),
            "num_tokens": (m * self.random.integers(18, 26, len(chosen))).tolist(),
            "temperature": 0.7,
            "top_p": 0.95,
            "max_new_tokens": 64,
            "baseline_pass_at_k": [0.03 * k for k in range(1, m + 1)],
        }

    def log(self, effect: Effect, stage: str) -> list[dict[str, Any]]:
        """Training metrics, one record a step (every tenth before RL)."""
        noise = self.random.standard_normal
        last = STEPS[stage][-1]
        if stage != "rl":
            return [
                {
                    "step": step,
                    "tokens": _tokens(stage, step),
                    "cross_entropy_nats": 2.3 + 3 * math.exp(-step / 80) + 0.05 * noise(),
                    "entropy_nats": 2.3 + effect.entropy_nats + 0.05 * noise(),
                    "loss": 2.4,
                    "learning_rate": 3e-3,
                    "gradient_norm": 0.7,
                }
                for step in range(10, last + 1, 10)
            ]
        return [
            {
                "step": step,
                "reward_mean": 0.4 + 0.1 * effect.rl_gain * step / last + 0.03 * noise(),
                "reward_mean_kept": 0.5,
                "entropy_nats": 0.35 + effect.entropy_nats - 0.15 * step / last + 0.01 * noise(),
                "response_tokens_mean": 21 + 3 * step / last + 0.4 * noise(),
                "truncated_share": 0.02,
                "dead_group_share": 0.1 + 0.1 * step / last,
                "gradient_norm": 0.5,
                "clip_share": 0.0,
                "max_ratio_deviation": 1e-6,
            }
            for step in range(1, last + 1)
        ]


def _tokens(stage: str, step: int) -> int:
    before = (
        0 if stage == "pretrain" else STEPS["pretrain"][-1] + (STEPS["midtrain"][-1] if stage == "rl" else 0)
    )
    return TOKENS_PER_STEP * (before + (step if stage != "rl" else 0))


def _write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if records:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
