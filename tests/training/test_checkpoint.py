"""Checkpoints: everything comes back, damage is seen, and no kill or full disk takes the last good one away."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_disk import fill, small_disk
from tests.small_study import Vocabulary

from rlprior.config import RunError
from rlprior.models.causal_lm import build_model, load_model
from rlprior.models.presets import ModelConfig
from rlprior.training import checkpoint as checkpoint_module
from rlprior.training.checkpoint import (
    Checkpoint,
    CheckpointSaver,
    checkpoint_directory,
    find_damage,
    last_good_checkpoint,
    list_checkpoints,
    remove_leftovers,
    restore_optimizer,
)
from rlprior.training.update import OptimizerConfig, Updater

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "optimizer.safetensors",
    "checkpoint.json",
}


def make_model() -> Any:
    shape = ModelConfig(
        num_layers=1, hidden_size=16, intermediate_size=24, num_heads=2, num_key_value_heads=1, head_dim=8
    )
    return build_model(shape, Vocabulary(24), max_positions=16, seed=0)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "corpus.bin").write_text("not the tokenizer's")
    return directory


def update(updater: Updater, step: int) -> None:
    """One update whose gradients are a function of the weights and the step."""
    ids = torch.arange(step, step + 8)[None] % 24
    updater.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    updater.apply(1.0, 0.01, step=step)


class Training:
    """A run that updates once a step and saves when told."""

    def __init__(
        self, run_directory: Path, tokenizer_directory: Path, milestones: tuple[int, ...] = ()
    ) -> None:
        self.run_directory, self.tokenizer_directory = run_directory, tokenizer_directory
        self.milestones = milestones
        self.updater = Updater(make_model(), OptimizerConfig())
        self.step = 0

    def save_at(self, step: int) -> Path:
        while self.step < step:
            self.step += 1
            update(self.updater, self.step)
        saver = CheckpointSaver(
            self.run_directory,
            model=self.updater.model,
            tokenizer_directory=self.tokenizer_directory,
            optimizer=self.updater.optimizer,
            is_milestone=lambda number: number in self.milestones,
        )
        return saver.save(step, {"tokens": 1000 * step, "num_skipped": 0})


@pytest.fixture
def training(tmp_path: Path, tokenizer_directory: Path) -> Training:
    return Training(tmp_path / "run", tokenizer_directory)


def steps_and_resumable(run_directory: Path) -> dict[int, bool]:
    """Step of each checkpoint -> whether it has the optimizer's state."""
    return {
        found.step: (found.directory / "optimizer.safetensors").exists()
        for found in list_checkpoints(run_directory)
    }


def last_good(run_directory: Path) -> Checkpoint:
    found = last_good_checkpoint(run_directory)
    assert found is not None
    return found


# round trip


def test_what_is_saved_comes_back_and_goes_on_bit_for_bit(training: Training) -> None:
    directory = training.save_at(3)
    assert directory == checkpoint_directory(training.run_directory, 3)
    assert {file.name for file in directory.iterdir()} == FILES
    found = last_good(training.run_directory)
    assert (found.step, found.state) == (3, {"tokens": 3000, "num_skipped": 0})
    resumed = Updater(load_model(found.directory).train(), OptimizerConfig())
    restore_optimizer(found.directory, resumed.model, resumed.optimizer)
    for step in range(4, 7):
        update(training.updater, step)
        update(resumed, step)
    ours, theirs = dict(training.updater.model.named_parameters()), dict(resumed.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        state, other = training.updater.optimizer.state[parameter], resumed.optimizer.state[theirs[name]]
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) for key in state), name
    # the comparison can fail: without the moments the next weights are others
    fresh = Updater(load_model(found.directory).train(), OptimizerConfig())
    for step in range(4, 7):
        update(fresh, step)
    assert not torch.equal(fresh.model.lm_head.weight, resumed.model.lm_head.weight)


def test_a_run_that_has_not_updated_yet_can_be_saved(training: Training) -> None:
    directory = training.save_at(0)
    restore_optimizer(directory, training.updater.model, training.updater.optimizer)
    assert last_good(training.run_directory).step == 0


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert last_good_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path) == []
    remove_leftovers(tmp_path)


# pruning


def test_the_newest_two_can_be_resumed_and_milestones_stay(tmp_path: Path, tokenizer_directory: Path) -> None:
    training = Training(tmp_path, tokenizer_directory, milestones=(2, 4))
    for step in range(1, 8):
        training.save_at(step)
    assert steps_and_resumable(tmp_path) == {2: False, 4: False, 6: True, 7: True}
    # a milestone is still a model, and its missing moments are no damage
    load_model(checkpoint_directory(tmp_path, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_good(tmp_path).step == 7
    shutil.rmtree(checkpoint_directory(tmp_path, 6))
    shutil.rmtree(checkpoint_directory(tmp_path, 7))
    assert last_good_checkpoint(tmp_path) is None


def test_damaged_later_checkpoints_do_not_push_out_new_ones(training: Training) -> None:
    """Both newest are damaged: the run starts over, and its new checkpoints are the ones to keep."""
    for step in (10, 11):
        shutil.rmtree(training.save_at(step) / "optimizer.safetensors", ignore_errors=True)
        (checkpoint_directory(training.run_directory, step) / "model.safetensors").write_bytes(b"")
    again = Training(training.run_directory, training.tokenizer_directory)
    for step in (1, 2, 3):
        assert again.save_at(step).exists()
    with pytest.warns(UserWarning, match="going back"):
        assert last_good(training.run_directory).step == 3
    again.save_at(10)  # takes the place of the damaged one
    with pytest.warns(UserWarning, match="step-00000011"):
        assert last_good(training.run_directory).step == 10


def test_leftovers_of_a_kill_are_removed_and_nothing_else(training: Training) -> None:
    directory = training.save_at(1)
    checkpoints = directory.parent
    for name in (".step-00000002", ".old-step-00000000"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "model.safetensors").write_text("half")
    (checkpoints / ".notes").write_text("somebody's")
    remove_leftovers(training.run_directory)
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000001", ".notes"}


# damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x01
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", sorted(FILES))
def test_damage_is_named_and_the_one_before_is_taken(
    name: str, damage: Callable[[Path], None], training: Training
) -> None:
    training.save_at(1)
    newest = training.save_at(2)
    damage(newest / name)
    if (
        name == "optimizer.safetensors" and damage is Path.unlink
    ):  # looks as if pruned: passed over in silence
        assert last_good(training.run_directory).step == 1
        return
    with pytest.warns(UserWarning, match="going back to the checkpoint before") as caught:
        assert last_good(training.run_directory).step == 1
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{newest}: {name} ")


def test_a_changed_count_is_damage_too(training: Training) -> None:
    training.save_at(1)
    manifest = training.save_at(2) / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace("2000", "2001"))
    with pytest.warns(UserWarning, match=r"checkpoint\.json has been damaged"):
        assert last_good(training.run_directory).step == 1


def test_nothing_good_is_none(training: Training) -> None:
    for step in (1, 2):
        flip(training.save_at(step) / "model.safetensors")
    with pytest.warns(UserWarning, match=r"model\.safetensors has been damaged"):
        assert last_good_checkpoint(training.run_directory) is None


# kills


class Killed(BaseException):
    """What `except Exception` and `ignore_errors` do not catch, as they do not catch a kill."""


class Killer:
    """Wraps the operations on the disk and raises before or after the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, deadline: int) -> None:
        self.deadline, self.num_events = deadline, 0
        self.names: list[str] = []
        places = [
            *((os, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")),
            (shutil, "copyfile"),
            (checkpoint_module, "save_file"),
            (checkpoint_module, "save_model"),
            (checkpoint_module, "file_hash"),
            (Path, "write_text"),
        ]
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._wrap(name, getattr(owner, name)))

    def _wrap(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._event(f"before {name}")
            result = operation(*args, **kwargs)
            self._event(f"after {name}")
            return result

        return wrapped

    def _event(self, name: str) -> None:
        self.names.append(name)
        self.num_events += 1
        if self.num_events == self.deadline:
            raise Killed(name)


def contents(run_directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(run_directory)): file.read_bytes()
        for file in sorted(run_directory.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize(("milestones", "removes"), [((2,), "unlink"), ((), "rmdir")])
def test_a_kill_at_any_point_leaves_a_good_checkpoint_and_the_same_end(
    milestones: tuple[int, ...],
    removes: str,
    tmp_path: Path,
    tokenizer_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checkpoint 4 is saved over and over, killed one operation later each time, until it gets through."""
    before = Training(tmp_path / "before", tokenizer_directory, milestones)
    for step in (1, 2, 3):
        before.save_at(step)
    shutil.copytree(before.run_directory, tmp_path / "whole")
    before.run_directory = tmp_path / "whole"
    before.save_at(4)
    expected = contents(tmp_path / "whole")
    assert steps_and_resumable(tmp_path / "whole") == {
        **dict.fromkeys(milestones, False),
        3: True,
        4: True,
    }
    outcomes: list[int] = []
    for deadline in range(1, 1000):
        run_directory = tmp_path / f"killed-{deadline}"
        shutil.copytree(tmp_path / "before", run_directory)
        before.run_directory = run_directory
        with monkeypatch.context() as patch:
            killer = Killer(patch, deadline)
            try:
                before.save_at(4)
            except Killed:
                pass
            else:
                break
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is damaged either
            found = last_good(run_directory)
        outcomes.append(found.step)
        # what is in sight is whole, the milestones that nobody resumes from included
        assert [find_damage(one.directory) for one in list_checkpoints(run_directory)] in (
            [None] * 2,
            [None] * 3,
        )
        assert found.state["tokens"] == 1000 * found.step
        remove_leftovers(run_directory)
        before.save_at(4)
        assert contents(run_directory) == expected
        shutil.rmtree(run_directory)
    assert contents(run_directory) == expected
    assert len(outcomes) == killer.num_events > 40
    # until the rename it is the one before, from then on the new one
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {3, 4}
    assert {"after save_file", "after save_model", "before rename", f"after {removes}"} <= {*killer.names}


# full disks


def test_a_full_disk_at_any_point_leaves_the_checkpoint_before(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        training = Training(disk / "run", tokenizer_directory)
        first = training.save_at(1)
        whole = contents(first)
        num_kib = sum(-(-len(data) // 4096) * 4 for data in whole.values())  # tmpfs gives whole pages
        assert 16 < num_kib < 128
        for leave_kib in range(0, num_kib, 4):
            ballast = fill(disk, leave_kib=leave_kib)
            with pytest.raises(RunError, match=r"step-00000002: the disk is full; free some space"):
                training.save_at(2)
            ballast.unlink()
            assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == [first.name]
            assert contents(first) == whole
        training.save_at(2)
        assert last_good(disk / "run").step == 2


def test_other_failures_leave_no_debris(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    training.save_at(1)

    def fail(*_: Any) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(ValueError, match="something else"):
        training.save_at(2)
    assert [path.name for path in (training.run_directory / "checkpoints").iterdir()] == ["step-00000001"]


def test_the_manifest_is_plain_data_that_others_can_check(training: Training) -> None:
    directory = training.save_at(1)
    manifest = json.loads((directory / "checkpoint.json").read_text())
    assert manifest["step"] == 1
    assert manifest["sha256"] == {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in FILES - {"checkpoint.json"}
    }
