"""`rlprior sft` and `rlprior dpo` as a person meets them: one after the other, stopped, killed, and without TRL."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.commands.test_mistakes import refused
from tests.posttraining.graded import write_answers
from tests.small_study import (
    files_below,
    last_checkpoint,
    outcome,
    rl_tables,
    run_cli,
    study_tables,
    train_tables,
    write_toml,
)
from tests.test_kill import TIMEOUT_SECONDS, kill_several_times, num_records, start, wait_until

from rlprior.cli import main
from rlprior.config import decode
from rlprior.models.causal_lm import load_tokenizer
from rlprior.posttraining.dpo import DPORunConfig
from rlprior.posttraining.sft import SFTRunConfig
from rlprior.runs.files import read_jsonl
from rlprior.sampling.pools import find_stores
from rlprior.tasks.config import TaskConfig, load_task
from rlprior.training.checkpoint import checkpoint_directory, list_checkpoints

TASK: dict[str, Any] = {"families": ["addition"], "difficulties": [1]}


def sft_file(directory: Path, **settings: Any) -> Path:
    common = {"num_problems": 30, "batch_size": 8, "num_steps": 4, "learning_rate": 1e-2, "save_every": 2}
    return write_toml(directory / "sft.toml", {"sft": {"task": TASK, **common, **settings}})


def dpo_file(directory: Path, **settings: Any) -> Path:
    common = {"num_problems": 12, "batch_size": 8, "num_steps": 4, "learning_rate": 1e-3, "save_every": 2}
    return write_toml(directory / "dpo.toml", {"dpo": {"task": TASK, **common, **settings}})


def store_of_answers(directory: Path, model: Path) -> Path:
    """Graded by hand, because a model so small answers nothing right."""
    problems = load_task(
        TaskConfig(families=("addition",), difficulties=(1,)),
        split="train",
        num_problems=12,
        seed=0,
        data_dir=None,
    )
    return write_answers(directory / "answers.jsonl", problems, load_tokenizer(model))


def test_each_result_is_the_start_of_another_stage(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = last_checkpoint(trained)
    store = store_of_answers(tmp_path, model)
    sft = ["sft", str(sft_file(tmp_path)), "--init-from", str(model)]
    assert main([*sft, "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()
    assert main(sft) == 0
    tuned = checkpoint_directory(tmp_path / "runs" / "sft", 4)
    dpo = ["dpo", str(dpo_file(tmp_path)), "--init-from", str(tuned), "--samples", store.name, "--seed=1"]
    capsys.readouterr()
    assert main([*dpo, "--dpo.task_seed=1", "--out", "other"]) == 2, "other problems, which nobody answered"
    assert main(dpo) == 0
    text = capsys.readouterr().out
    assert (
        "pairs: 24 pairs from 12 of 12 prompts (0 without a correct answer, 0 without one to reject)" in text
    )
    aligned = checkpoint_directory(tmp_path / "runs" / "dpo", 4)
    rl = ["rl", str(write_toml(tmp_path / "rl.toml", rl_tables("rl.num_steps=1")))]
    assert main([*rl, "--init-from", str(aligned)]) == 0
    train = [
        "train",
        str(
            write_toml(tmp_path / "train.toml", train_tables("training.num_steps=1", "training.eval_every=0"))
        ),
    ]
    assert main([*train, "--init-from", str(aligned)]) == 0
    tables = study_tables()
    evaluation = {"data": tables["data"], "evaluation": tables["evaluation"], "window_tokens": 128}
    config = write_toml(tmp_path / "evaluate.toml", evaluation)
    assert main(["evaluate", str(aligned), "--config", str(config), "--out", "scores"]) == 0
    # an evaluation's own store has the form that --samples takes: here no answer in it is right
    (scores,) = find_stores(tmp_path / "scores")
    capsys.readouterr()
    again = ["dpo", str(dpo_file(tmp_path, split="test")), "--init-from", str(aligned), "--out", "again"]
    assert main([*again, "--samples", str(scores)]) == 1
    assert (
        "no pair can be made: 0 pairs from 0 of 8 prompts (8 without a correct answer"
        in capsys.readouterr().err
    )


def test_nothing_is_done_twice_and_another_store_is_another_run(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = last_checkpoint(trained)
    store = store_of_answers(tmp_path, model)
    command = [
        "dpo",
        str(dpo_file(tmp_path, num_steps=1)),
        "--init-from",
        str(model),
        "--samples",
        str(store),
    ]
    command += ["--out", str(tmp_path / "run")]
    assert main(command) == 0
    before = {path: (tmp_path / "run" / path).stat().st_mtime_ns for path in files_below(tmp_path / "run")}
    assert main(command) == 0
    assert "dpo run: done already" in capsys.readouterr().out
    assert {path: (tmp_path / "run" / path).stat().st_mtime_ns for path in before} == before
    moved = store.rename(tmp_path / "moved.jsonl")
    grades = store.with_suffix(".grades.jsonl")
    grades.write_text(grades.read_text().replace('"correct"', '"wrong"', 1))
    grades.rename(moved.with_suffix(".grades.jsonl"))
    command[5] = str(moved)
    assert "holds another run (it differs in inputs.samples, inputs.grades)" in refused(capsys, *command)


@pytest.mark.parametrize("found", ["", "1.9.2"])
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_without_trl_one_line_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, found: str
) -> None:
    def version(package: str) -> str:
        assert package == "trl"
        if not found:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    path = {"sft": sft_file, "dpo": dpo_file}[name](tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", version)
    message = refused(capsys, name, path, "--init-from", tmp_path, "--out", tmp_path / "run")
    state = f"found {found}" if found else "not installed"
    assert (
        message == f"'rlprior {name}' needs TRL 1.16 or newer ({state}); pip install 'rlprior[integrations]'"
    )
    assert not (tmp_path / "run").exists()


def test_mistakes_are_told_in_one_line(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = last_checkpoint(trained)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    out = ["--init-from", model, "--out", tmp_path / "run"]
    pairs = write_toml(tmp_path / "pairs.toml", {"sft": {"path": "pairs.jsonl"}})
    place = f"{tmp_path / 'pairs.jsonl'}:2: needs `prompt` and `completion`; it has prompt"
    assert place == refused(capsys, "sft", pairs, *out, "--data-dir", tmp_path)
    assert "init_from is missing" in refused(capsys, "sft", pairs)
    missing = f"{tmp_path / 'no.jsonl'}: no such file or directory"
    assert missing == refused(capsys, "sft", pairs, *out, "--data-dir", tmp_path, "--sft.path=no.jsonl")
    dpo = dpo_file(tmp_path)
    assert missing == refused(capsys, "dpo", dpo, *out, "--samples", tmp_path / "no.jsonl")
    assert "unknown key 'dpo.bata'; did you mean 'beta'?" in refused(capsys, "dpo", dpo, *out, "--dpo.bata=1")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_the_settings_of_the_document_are_settings() -> None:
    text = (Path(__file__).parents[2] / "docs" / "posttraining.md").read_text(encoding="utf-8")
    sft, dpo = (tomllib.loads(block.partition("```")[0]) for block in text.split("```toml")[1:])
    assert decode(SFTRunConfig, {**sft, "init_from": "m"}, source="sft").sft.num_problems == 4000
    assert decode(DPORunConfig, {**dpo, "init_from": "m"}, source="dpo").dpo.num_problems == 1000


def long_runs(
    directory: Path, name: str, model: Path, num_steps: int
) -> tuple[list[str | Path], list[str | Path]]:
    """One run under two names: to be made in peace, and to be stopped."""
    if name == "sft":
        common: list[str | Path] = ["sft", sft_file(directory, num_steps=num_steps, save_every=5)]
    else:
        store = store_of_answers(directory, model)
        common = ["dpo", dpo_file(directory, num_steps=num_steps, save_every=5), "--samples", store]
    common += ["--init-from", model]
    return [*common, "--out", directory / "whole"], [*common, "--out", directory / "stopped"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_terminated_run_saves_says_how_to_go_on_and_ends_with_0(
    tmp_path: Path, trained: Path, name: str
) -> None:
    whole, stopped = long_runs(tmp_path, name, last_checkpoint(trained), num_steps=60)
    process = start(stopped, tmp_path)
    try:
        wait_until(lambda: num_records(tmp_path / "stopped") > 2, process)
        process.terminate()
        _, message = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0
    last = list_checkpoints(tmp_path / "stopped")[-1].step
    assert message.startswith(f"rlprior: stopped after step {last} of ")
    assert message.count("\n") == 1
    assert num_records(tmp_path / "stopped") == last
    assert not (tmp_path / "stopped" / "result.json").exists()
    for command in (whole, stopped):
        assert main([str(argument) for argument in command]) == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, trained: Path, name: str) -> None:
    whole, killed = long_runs(tmp_path, name, last_checkpoint(trained), num_steps=200)
    kill_several_times(killed, tmp_path / "stopped", tmp_path, num_kills=3)
    for command in (whole, killed):
        done = run_cli(*command, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    steps = [record["step"] for record in read_jsonl(tmp_path / "stopped" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert json.loads((tmp_path / "stopped" / "result.json").read_text())["num_skipped"] == 0
