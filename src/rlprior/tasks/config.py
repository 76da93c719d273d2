"""Which problems a stage poses, and how to get them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlprior.config import HOW, UsageError
from rlprior.tasks.equivalence import require_math_verify
from rlprior.tasks.files import load_problems
from rlprior.tasks.problem import Problem
from rlprior.tasks.reward import check_reward, split_reward
from rlprior.tasks.synthetic import Split, check_families, generate_problems


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Verifiable problems, generated or read from a file.

    Attributes:
        kind: `synthetic` (generated) or `file` (JSON Lines).
        families: of generated problems.
        difficulties: of generated problems, 1 (easiest) to 4.
        path: of a file, relative to the data directory.
        limit: at most that many problems, None for no limit.
        verifier: `rules`; `math`, rules and then math-verify; or a reward function `path.py:function`, its path relative to the data
            directory. Multiple choice is by exact letter with `rules` and `math` alike.
        verifier_timeout_seconds: how long math-verify or a reward function may take for one answer.
        verifier_workers: processes that math-verify or a reward function runs in.
    """

    kind: Literal["synthetic", "file"] = "synthetic"
    families: tuple[str, ...] = ("addition", "subtraction")
    difficulties: tuple[int, ...] = (2,)
    path: str | None = None
    limit: int | None = None
    verifier: str = "rules"
    verifier_timeout_seconds: float = 1.0
    verifier_workers: int = field(default=2, metadata=HOW)

    def __post_init__(self) -> None:
        if self.kind == "file" and not self.path:
            raise ValueError("path is missing; a task of kind 'file' needs the path of a JSON Lines file")
        if self.kind == "synthetic" and self.path is not None:
            raise ValueError("path is for kind = 'file'; leave it out or write that kind")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit} must be at least 1; leave it out for no limit")
        if self.kind == "synthetic":
            try:
                check_families(self.families, self.difficulties)
            except UsageError as error:
                raise ValueError(str(error)) from None
        if self.verifier not in ("rules", "math") and split_reward(self.verifier) is None:
            raise ValueError(
                f"verifier = {self.verifier!r} is unknown; write 'rules', 'math' or 'path.py:function'"
            )
        if not 0 < self.verifier_timeout_seconds < float("inf"):
            raise ValueError(
                f"verifier_timeout_seconds = {self.verifier_timeout_seconds} must be a time above 0"
            )
        if self.verifier_workers < 1:
            raise ValueError(f"verifier_workers must be at least 1, not {self.verifier_workers}")

    def reward_function(self, data_dir: Path | None) -> tuple[Path, str] | None:
        """File and name of the reward function, None where the task has none."""
        reward = split_reward(self.verifier)
        return (resolve_path(reward[0], data_dir), reward[1]) if reward else None

    def check_verifier(self, data_dir: Path | None) -> None:
        """Raise UsageError where what the verifier needs is not there: math-verify, or the reward function in its file."""
        if self.verifier == "math":
            require_math_verify()
        elif reward := self.reward_function(data_dir):
            check_reward(*reward)

    def input_files(self, data_dir: Path | None) -> dict[str, Path]:
        """Files whose content is part of what the task is, by what they are."""
        files = {"problems": resolve_path(self.path, data_dir)} if self.path else {}
        if reward := self.reward_function(data_dir):
            files["reward"] = reward[0]
        return files


def load_task(
    config: TaskConfig, *, split: Split, num_problems: int | None, seed: int, data_dir: Path | None
) -> list[Problem]:
    """The problems of a task, the same ones whenever it is asked with the same arguments.

    Args:
        config: which problems.
        split: side of the split of generated problems. A file is one side by itself: name another file for the other.
        num_problems: how many; None for all of a file. Of a file, the first ones, or all if it has fewer.
        seed: of generated problems.
        data_dir: what a relative path is relative to; None for the working directory.

    Raises:
        UsageError: more generated problems than exist, none asked for, or a file that is missing or has other fields.
        RunError: a file that cannot be used, with its line.
    """
    counts = [count for count in (num_problems, config.limit) if count is not None]
    num_wanted = min(counts) if counts else None
    if config.kind == "file":
        path = resolve_path(config.path or "", data_dir)
        return load_problems(path, any_answer=config.verifier != "rules")[:num_wanted]
    if num_wanted is None:
        raise UsageError("generated problems have no natural number; write num_problems or limit")
    return generate_problems(
        families=config.families,
        difficulties=config.difficulties,
        num_problems=num_wanted,
        split=split,
        seed=seed,
    )


def data_folder(data_dir: str | None) -> Path | None:
    """The data directory as a config writes it: a path, or None for the working directory."""
    return Path(data_dir) if data_dir else None


def resolve_path(path: str, data_dir: Path | None) -> Path:
    """`path` below `data_dir`, unless it is absolute or there is no data directory."""
    expanded = Path(path).expanduser()
    return expanded if data_dir is None else data_dir / expanded
