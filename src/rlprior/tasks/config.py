"""Which problems a stage poses, and how to get them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlprior.config import UsageError
from rlprior.tasks.files import load_problems
from rlprior.tasks.problem import Problem
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
    """

    kind: Literal["synthetic", "file"] = "synthetic"
    families: tuple[str, ...] = ("addition", "subtraction")
    difficulties: tuple[int, ...] = (2,)
    path: str | None = None
    limit: int | None = None

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
        return load_problems(resolve_path(config.path or "", data_dir))[:num_wanted]
    if num_wanted is None:
        raise UsageError("generated problems have no natural number; write num_problems or limit")
    return generate_problems(
        families=config.families,
        difficulties=config.difficulties,
        num_problems=num_wanted,
        split=split,
        seed=seed,
    )


def resolve_path(path: str, data_dir: Path | None) -> Path:
    """`path` below `data_dir`, unless it is absolute or there is no data directory."""
    expanded = Path(path).expanduser()
    return expanded if data_dir is None else data_dir / expanded
