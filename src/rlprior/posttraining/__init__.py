"""Supervised fine-tuning and direct preference optimization on TRL, an optional package."""

from __future__ import annotations

import importlib.metadata
import re

from rlprior.config import UsageError

OLDEST_TRL = (1, 16)


def require_trl(command: str) -> None:
    """UsageError unless a TRL that the stages work with is installed; nothing is imported."""
    oldest = ".".join(map(str, OLDEST_TRL))
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or (int(number[1]), int(number[2])) < OLDEST_TRL:
        found = f"found {version}" if version else "not installed"
        raise UsageError(
            f"'rlprior {command}' needs TRL {oldest} or newer ({found}); pip install 'rlprior[integrations]'"
        )
