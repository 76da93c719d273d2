"""A study that takes seconds: one tiny model on generated problems, and ways to run its stages."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from rlprior.cli import main
from rlprior.config import apply_overrides, decode
from rlprior.study.config import StudyConfig
from rlprior.study.plan import PlannedRun, plan_run, plan_study
from rlprior.study.runner import execute
from rlprior.training.checkpoint import checkpoint_directory

_PROBLEMS = {"families": ["addition", "subtraction"], "difficulties": [1]}

_TABLES: dict[str, Any] = {
    "title": "a small study",
    "baseline": "ce",
    "seeds": [0],
    "arms": {
        "ce": {"label": "cross-entropy", "objective": {"name": "cross_entropy"}},
        "sharp": {"label": "β = -0.25", "objective": {"name": "reward_shaping", "beta": -0.25}},
    },
    "data": {
        "held_out_fraction": 0.1,
        "tokenizer": {"vocab_size": 300},
        "sources": [
            {"name": "sums", "kind": "problems", "num_problems": 400, "problems": _PROBLEMS},
            {
                "name": "stories",
                "kind": "problems",
                "num_problems": 200,
                "problems": {"families": ["word_problems"]},
            },
        ],
    },
    "model": {
        "preset": "tiny",
        "num_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "pretrain": {
        "mixture": {"sums": 1, "stories": 1},
        "num_steps": 6,
        "batch_tokens": 256,
        "sequence_length": 64,
        "log_every": 1,
        "eval_every": 3,
        "save_every": 2,
        "schedule": {
            "peak_learning_rate": 1e-2,
            "final_learning_rate": 1e-3,
            "warmup_steps": 2,
            "decay_steps": 2,
        },
    },
    "midtrain": {
        "mixture": {"sums": 3, "stories": 1},
        "num_steps": 4,
        "batch_tokens": 256,
        "sequence_length": 128,
        "rope_theta": 1e6,
        "log_every": 1,
        "save_every": 2,
        "schedule": {
            "peak_learning_rate": 1e-2,
            "final_learning_rate": 1e-3,
            "warmup_steps": 1,
            "decay_steps": 3,
        },
    },
    "rl": {
        "task": _PROBLEMS,
        "num_problems": 40,
        "num_steps": 4,
        "prompts_per_step": 3,
        "samples_per_prompt": 4,
        # an untrained policy answers nothing right: refills would only take time
        "dynamic_sampling": "off",
        "length_schedule": [{"until_step": 2, "max_new_tokens": 6}, {"max_new_tokens": 8}],
        "learning_rate": 1e-3,
        "micro_batch_rows": 8,
        "save_every": 2,
    },
    "evaluation": {
        "held_out_sources": ["sums", "stories"],
        "decoding": {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 8},
        "final": {"held_out_tokens": 600, "num_problems": 8, "samples_per_problem": 4},
        "intermediate": {"held_out_tokens": 200, "num_problems": 4, "samples_per_problem": 2},
        "tasks": {"sums": _PROBLEMS},
    },
}


def study_tables(*overrides: str) -> dict[str, Any]:
    """The study as TOML data, with `section.key=value` overrides."""
    return apply_overrides(copy.deepcopy(_TABLES), overrides)


def study_config(*overrides: str) -> StudyConfig:
    """The study, with `section.key=value` overrides."""
    return decode(StudyConfig, study_tables(*overrides), source="small study")


def write_toml(path: Path, tables: Mapping[str, Any]) -> Path:
    """Write TOML data; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def train_tables(*overrides: str) -> dict[str, Any]:
    """What `rlprior train` reads: the study's corpus, model and pre-training."""
    tables = study_tables()
    alone = {"data": tables["data"], "model": tables["model"], "training": tables["pretrain"]}
    return apply_overrides(alone, overrides)


def rl_tables(*overrides: str) -> dict[str, Any]:
    """What `rlprior rl` reads; `init_from` is still to be given."""
    return apply_overrides({"rl": study_tables()["rl"]}, overrides)


def find_run(plan: Sequence[PlannedRun], label: str) -> PlannedRun:
    """The run of a plan by its label."""
    return next(planned for planned in plan if planned.label == label)


def make_runs(directory: Path, *labels: str, config: StudyConfig | None = None) -> list[PlannedRun]:
    """Make the named runs of the small study in this process, in the plan's order; returns them."""
    plan = plan_study(config or study_config(), directory)
    wanted = [planned for planned in plan if planned.label in labels]
    assert len(wanted) == len(labels), [planned.label for planned in plan]
    for planned in wanted:
        execute(planned)
    return wanted


def make_run(stage: str, config: Any, directory: Path) -> PlannedRun:
    """Make one run of a stage in `directory`, in this process."""
    planned = plan_run(stage, config, label=stage, directory=directory)
    execute(planned)
    return planned


def command(*arguments: str | Path) -> list[str]:
    """The command line of `rlprior` with `arguments`, warnings being errors."""
    return [sys.executable, "-W", "error", "-m", "rlprior", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread, no network, and lines wide enough for long paths."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "500"}


def run_cli(
    *arguments: str | Path, cwd: Path | None = None, timeout_seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `rlprior` in a process of its own."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )


def files_below(directory: Path) -> set[str]:
    """Files in a folder and its folders, by their path in it."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Stands in for SIGKILL: no `except Exception` sees it."""


def crash_on_call(number: int, after: bool, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, killed before or after its call of that number."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if after or calls != number else None
        if calls == number:
            raise Killed
        return result

    return call


def outcome(directory: Path) -> dict[str, bytes]:
    """Every byte that must not depend on interruptions: the metrics, the result and the last checkpoint."""
    last = sorted((directory / "checkpoints").glob("step-*"))[-1]
    files = [directory / "metrics.jsonl", directory / "result.json", *sorted(last.iterdir())]
    assert {"model.safetensors", "optimizer.safetensors"} <= {file.name for file in files}
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


class Vocabulary:
    """Stands in for a tokenizer where its size and its special tokens are all that counts."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __len__(self) -> int:
        return self.num_tokens


class GradientRecorder:
    """Takes the place of `Updater`: keeps the gradients and changes nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.gradients: list[Tensor] = []

    def apply(self, loss: float, learning_rate: float, *, step: int) -> float:
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return 0.0


def train_small_model(root: Path) -> Path:
    """The run that `rlprior train` makes of the small study's pre-training."""
    assert (
        main(["train", str(write_toml(root / "train.toml", train_tables())), "--out", str(root / "run")]) == 0
    )
    return root / "run"


def last_checkpoint(run: Path) -> Path:
    """Where `train_small_model` leaves its last checkpoint."""
    return checkpoint_directory(run, _TABLES["pretrain"]["num_steps"])


def torchrun(num_processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in several processes; warnings are errors."""
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_processes), "-m", "rlprior", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
