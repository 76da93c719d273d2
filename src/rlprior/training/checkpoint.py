"""Checkpoints: a Hugging Face folder with the optimizer's state beside the weights, written aside, checksummed, renamed.

    checkpoints/step-00000400/
      config.json, model.safetensors, tokenizer.json, ...   what AutoModelForCausalLM and AutoTokenizer load
      optimizer.safetensors                                 moments; only in the newest checkpoints
      checkpoint.json                                       step, counters, SHA-256 of every other file, fingerprint of its own

Nothing else is state: every random stream is a function of (seed, name, step), and the data cursor is a count.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlprior.config import RunError, fingerprint
from rlprior.models.causal_lm import save_model
from rlprior.runs import disk_errors, file_hash, sync_directory

PREFIX = "step-"
OPTIMIZER_FILE = "optimizer.safetensors"
MANIFEST_FILE = "checkpoint.json"
NUM_RESUMABLE = 2


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    directory: Path
    step: int
    state: dict[str, Any]


def checkpoint_directory(run_directory: Path, step: int) -> Path:
    """Where step `step` of a run is saved."""
    return run_directory / "checkpoints" / f"{PREFIX}{step:08d}"


def save_checkpoint(
    run_directory: Path,
    *,
    step: int,
    model: Any,
    tokenizer_directory: Path,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    is_milestone: Callable[[int], bool],
) -> Path:
    """Write step `step`'s checkpoint and remove what it makes superfluous.

    Args:
        run_directory: the run's folder.
        step: number of updates done.
        model: Hugging Face model.
        tokenizer_directory: folder whose tokenizer files are copied in.
        optimizer: AdamW over the model's parameters.
        state: counters to resume from (plain data).
        is_milestone: step -> bool; checkpoints for which it is false go once two newer ones exist.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: the disk is full. The checkpoints before stay whole.
    """
    final = checkpoint_directory(run_directory, step)
    aside = final.with_name(f".{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with disk_errors(final):
        try:
            aside.mkdir(parents=True)
            save_model(model, aside, tokenizer_directory=tokenizer_directory)
            save_file(_optimizer_tensors(model, optimizer), aside / OPTIMIZER_FILE)
            hashes = {file.name: file_hash(file) for file in sorted(aside.iterdir())}
            manifest: dict[str, Any] = {"step": step, "state": dict(state), "sha256": hashes}
            manifest["fingerprint"] = fingerprint(manifest)
            (aside / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
            for file in aside.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            # safetensors reports a full disk as its own error type, with the system's text inside
            if "No space left on device" in str(error) and not isinstance(error, OSError):
                raise RunError(
                    f"{final}: the disk is full; free some space and run the same command again"
                ) from None
            raise
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        sync_directory(final.parent)
    _prune(run_directory, step, is_milestone)
    return final


def _optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().contiguous()
    return tensors


def restore_optimizer(directory: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved moments back, by parameter name."""
    tensors = load_file(directory / OPTIMIZER_FILE)
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        optimizer.state[parameters[name]][kind] = value


def list_checkpoints(run_directory: Path) -> list[Checkpoint]:
    """Checkpoints of a run by step, whether or not they can be resumed from."""
    found: list[Checkpoint] = []
    for directory in sorted((run_directory / "checkpoints").glob(f"{PREFIX}*")):
        manifest = json.loads((directory / MANIFEST_FILE).read_text())
        found.append(Checkpoint(directory, manifest["step"], manifest["state"]))
    return found


def last_good_checkpoint(run_directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written and which has the optimizer's state; None if there is none.

    A damaged one is named in a warning and passed over, and the run goes on from the one before.
    """
    for directory in sorted((run_directory / "checkpoints").glob(f"{PREFIX}*"), reverse=True):
        damage = find_damage(directory)
        if damage:
            warnings.warn(f"{directory}: {damage}; going back to the checkpoint before", stacklevel=2)
            continue
        manifest = json.loads((directory / MANIFEST_FILE).read_text())
        if OPTIMIZER_FILE in manifest["sha256"] and (directory / OPTIMIZER_FILE).exists():
            return Checkpoint(directory, manifest["step"], manifest["state"])
    return None


def tokens_seen(directory: Path) -> int:
    """Training tokens behind a Hugging Face folder, over all language-model stages; 0 where it is not one of ours."""
    manifest = directory / MANIFEST_FILE
    return json.loads(manifest.read_text())["state"].get("tokens", 0) if manifest.exists() else 0


def remove_leftovers(run_directory: Path) -> None:
    """Delete what a kill left half-written or half-removed."""
    for directory in (run_directory / "checkpoints").glob(f".*{PREFIX}*"):
        shutil.rmtree(directory)


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. A pruned optimizer state is not damage."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text())
        is_whole = manifest.pop("fingerprint") == fingerprint(manifest)
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST_FILE} cannot be read"
    if not is_whole:
        return f"{MANIFEST_FILE} has been damaged (its fingerprint differs)"
    hashes: dict[str, str] = manifest["sha256"]
    for name, expected in hashes.items():
        file = directory / name
        if not file.exists():
            if name == OPTIMIZER_FILE:
                continue
            return f"{name} is missing"
        if file_hash(file) != expected:
            return f"{name} has been damaged (its checksum differs)"
    return None


def _prune(run_directory: Path, step: int, is_milestone: Callable[[int], bool]) -> None:
    by_step = {
        int(directory.name.removeprefix(PREFIX)): directory
        for directory in (run_directory / "checkpoints").glob(f"{PREFIX}*")
    }
    # later ones are damaged, or the run would have gone on from them: they must not count as the newest
    reached = sorted(number for number in by_step if number <= step)
    for number in reached[:-NUM_RESUMABLE]:
        directory = by_step[number]
        if is_milestone(number):
            (directory / OPTIMIZER_FILE).unlink(missing_ok=True)
        else:
            # out of sight first: a kill in the middle of the removal must not leave a checkpoint with holes
            doomed = directory.with_name(f".old-{directory.name}")
            directory.rename(doomed)
            shutil.rmtree(doomed)
