"""Checkpoints: a Hugging Face folder with the optimizer's state beside the weights, written aside, checksummed, renamed.

    checkpoints/step-00000400/
      config.json, model.safetensors, tokenizer.json, ...   what AutoModelForCausalLM and AutoTokenizer load
      optimizer.safetensors                                 moments, whole; only in the newest checkpoints; several
                                                            files of 5 GB where they are larger
      checkpoint.json                                       step, counters, SHA-256 of every other file, fingerprint of its own

Nothing else is state: every random stream is a function of (seed, name, step), and the data cursor is a count.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from rlprior.config import RunError, UsageError, fingerprint
from rlprior.models.causal_lm import save_model
from rlprior.runs.files import disk_errors, file_hash, sync_directory
from rlprior.world import ALONE, World

PREFIX = "step-"
MAX_FILE_BYTES = 5 * 10**9
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


class CheckpointSaver:
    """Writes the checkpoints of one run, each whole or not at all, and removes those that newer ones make superfluous.

    The files are the same for any number of processes: tensors are gathered whole, the first process writes the weights, and the
    optimizer's files are shared out among all of them. Every process calls every method.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        model: Any,
        tokenizer_directory: Path,
        optimizer: torch.optim.Optimizer,
        is_milestone: Callable[[int], bool],
        world: World = ALONE,
        in_background: bool = False,
    ) -> None:
        """Prepare for saving; nothing is written yet.

        Args:
            run_directory: the run's folder, which all processes see.
            model: Hugging Face model, its parameters whole or sharded by FSDP2.
            tokenizer_directory: folder whose tokenizer files are copied in.
            optimizer: AdamW over the model's parameters.
            is_milestone: step -> bool; checkpoints for which it is false go once two newer ones exist.
            world: the processes.
            in_background: `save` returns when the state is copied, and a thread writes it.
        """
        self.run_directory = run_directory
        self.model, self.optimizer = model, optimizer
        self.tokenizer_directory = tokenizer_directory
        self.is_milestone = is_milestone
        self.world = world
        self.in_background = in_background
        self._pending: _PendingCheckpoint | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of step `step`, after the one before is finished.

        Args:
            step: number of updates done.
            state: counters to resume from (plain data).

        Returns:
            The checkpoint's folder; written in the background, it exists from `finish()` on, which is to be called once no process
            `is_writing`, lest a kill takes the finished files.

        Raises:
            RunError: the disk is full. The checkpoints before stay whole.
        """
        self.finish()
        final = checkpoint_directory(self.run_directory, step)
        aside = _aside(final)
        self.world.on_main(lambda: _make_folder(aside, final))
        weights = _whole_weights(self.model, self.world, copy=self.in_background)
        moments = _optimizer_files(self.model, self.optimizer, self.world, copy=self.in_background)
        self._pending = _PendingCheckpoint(final, step, dict(state))
        write = partial(self._write, aside, weights, moments)
        if self.in_background:
            self._pending.thread = threading.Thread(target=self._pending.run, args=(write,))
            self._pending.thread.start()
        else:
            self._pending.run(write)
            self.finish()
        return final

    @property
    def is_writing(self) -> bool:
        """Whether this process is writing in the background; where none is, `finish` waits for nobody."""
        return (
            self._pending is not None and self._pending.thread is not None and self._pending.thread.is_alive()
        )

    def finish(self) -> None:
        """Wait for the files of all processes, and put the checkpoint in sight; nothing where none is being written.

        Raises:
            RunError: the disk of one of them was full. Nothing is left behind.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.thread is not None:
            pending.thread.join()
        outcomes = self.world.gather((pending.hashes, pending.error))

        def publish_and_prune() -> None:
            _publish(pending, outcomes)
            _prune(self.run_directory, pending.step, self.is_milestone)

        self.world.on_main(publish_and_prune)

    def _write(
        self,
        aside: Path,
        weights: dict[str, torch.Tensor] | None,
        moments: dict[str, dict[str, torch.Tensor]],
    ) -> dict[str, str]:
        """Write this process's files; their hashes by name."""
        written = [aside / name for name in moments]
        for file in written:
            save_file(moments[file.name], file)
        if weights is not None:
            save_model(self.model, aside, tokenizer_directory=self.tokenizer_directory, weights=weights)
            written += [file for file in sorted(aside.iterdir()) if not _is_optimizer_file(file.name)]
        for file in written:
            _flush(file)
        return {file.name: file_hash(file) for file in written}


@dataclass
class _PendingCheckpoint:
    """A checkpoint whose files are being written aside, and what came of this process's."""

    directory: Path
    step: int
    state: dict[str, Any]
    hashes: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None
    thread: threading.Thread | None = None

    def run(self, write: Callable[[], dict[str, str]]) -> None:
        try:
            self.hashes = write()
        except Exception as error:
            self.error = error
        except BaseException as error:
            self.error = RuntimeError(f"the checkpoint was not written: {error!r}")
            raise


def _publish(pending: _PendingCheckpoint, outcomes: list[tuple[dict[str, str], Exception | None]]) -> None:
    """Write the manifest over the files of all processes, and rename the folder."""
    final = pending.directory
    aside = _aside(final)
    with _disk_errors(final):
        for _, error in outcomes:
            if error is not None:
                raise error
        hashes = {name: digest for part, _ in outcomes for name, digest in part.items()}
        manifest: dict[str, Any] = {
            "step": pending.step,
            "state": pending.state,
            "sha256": dict(sorted(hashes.items())),
        }
        manifest["fingerprint"] = fingerprint(manifest)
        (aside / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        _flush(aside / MANIFEST_FILE)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        sync_directory(final.parent)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}")


def _make_folder(aside: Path, final: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    with disk_errors(final):
        aside.mkdir(parents=True)


@contextlib.contextmanager
def _disk_errors(final: Path) -> Iterator[None]:
    """As `disk_errors`, for safetensors too, which has an error type of its own; what was written aside goes."""
    try:
        with disk_errors(final):
            yield
    except Exception as error:
        shutil.rmtree(_aside(final), ignore_errors=True)
        if "No space left on device" in str(error):
            raise RunError(
                f"{final}: the disk is full; free some space and run the same command again"
            ) from None
        raise


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _whole(tensor: torch.Tensor, *, is_kept: bool, copy: bool) -> torch.Tensor | None:
    """The whole tensor in CPU memory where it `is_kept`; every process calls this, as sharded ones are gathered."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()  # which may be the live storage, where one process has it all
    return tensor.detach().to("cpu", copy=copy).contiguous() if is_kept else None


def _whole_weights(model: Any, world: World, *, copy: bool) -> dict[str, torch.Tensor] | None:
    """Every parameter, once where it is tied, and every persistent buffer; None on all processes but the first."""
    persistent = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in [*model.named_parameters(), *buffers]:
        kept = _whole(tensor, is_kept=world.is_main, copy=copy)
        if kept is not None:
            whole[name] = kept
    return whole if world.is_main else None


def _optimizer_files(
    model: Any, optimizer: torch.optim.Optimizer, world: World, *, copy: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """The files that this process has to write, by name: the moments of all parameters, in files of at most MAX_FILE_BYTES."""
    entries = [
        (f"{key}/{name}", value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    ]
    groups: list[list[tuple[str, torch.Tensor]]] = [[]]
    size = 0
    for name, value in entries:
        num_bytes = value.numel() * value.element_size()
        if groups[-1] and size + num_bytes > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((name, value))
        size += num_bytes
    files: dict[str, dict[str, torch.Tensor]] = {}
    for number, group in enumerate(groups):
        is_kept = number % world.size == world.rank
        whole = {name: _whole(value, is_kept=is_kept, copy=copy) for name, value in group}
        if is_kept:
            place = f"-{number + 1:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            files[f"optimizer{place}.safetensors"] = {
                key: value for key, value in whole.items() if value is not None
            }
    return files


def _is_optimizer_file(name: str) -> bool:
    return name.startswith("optimizer") and name.endswith(".safetensors")


def _find_optimizer_files(directory: Path) -> list[Path]:
    return [file for file in sorted(directory.iterdir()) if _is_optimizer_file(file.name)]


def restore_optimizer(directory: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved moments back, by parameter name, each process its part."""
    parameters = dict(model.named_parameters())
    for file in _find_optimizer_files(directory):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dictionary
                kind, name = key.split("/", 1)
                value, parameter = opened.get_tensor(key), parameters[name]
                if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                    value = _part_of(value, parameter)
                # the count of steps too: a fused optimizer wants it beside the weights
                optimizer.state[parameter][kind] = value.to(parameter.device)


def _part_of(value: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """What this process holds of a whole tensor; all processes read the same file, so that nothing is sent."""
    mesh, placements = parameter.device_mesh, parameter.placements
    part = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
    # weights that are offloaded lie on the CPU, whatever the mesh
    part = part.to(parameter.to_local().device)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )


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
        optimizer = [name for name in manifest["sha256"] if _is_optimizer_file(name)]
        if optimizer and all((directory / name).exists() for name in optimizer):
            return Checkpoint(directory, manifest["step"], manifest["state"])
    return None


def find_checkpoint(run_directory: Path) -> Checkpoint | None:
    """The newest good checkpoint, after what a killed process left is removed."""
    remove_leftovers(run_directory)
    return last_good_checkpoint(run_directory)


def check_precision(checkpoint: Checkpoint, precision: str) -> None:
    """UsageError where a run that left the choice to the device has come to one with another."""
    before = checkpoint.state["precision"]
    if before != precision:
        raise UsageError(
            f"{checkpoint.directory}: computed in {before}, and 'auto' is {precision} on this device; go on on a device like the "
            f"first, or start anew with precision = '{before}'"
        )


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
            if _is_optimizer_file(name):
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
            for file in _find_optimizer_files(directory):
                file.unlink()
        else:
            # out of sight first: a kill in the middle of the removal must not leave a checkpoint with holes
            doomed = directory.with_name(f".old-{directory.name}")
            directory.rename(doomed)
            shutil.rmtree(doomed)
