"""The command line as a person meets it: help, plans, overrides, and each command in turn."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.small_study import (
    command,
    environment,
    files_below,
    last_checkpoint,
    rl_tables,
    run_cli,
    study_tables,
    train_tables,
    write_toml,
)

import rlprior
from rlprior import cli
from rlprior.cli import COMMANDS, command_module, main
from rlprior.runs.files import read_jsonl
from rlprior.training.checkpoint import checkpoint_directory


def evaluate_tables() -> dict[str, Any]:
    tables = study_tables()
    return {"data": tables["data"], "evaluation": tables["evaluation"], "window_tokens": 128}


# Help


def help_seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([*command(*arguments), "--help"], check=True, capture_output=True, env=environment())
    return time.perf_counter() - start


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_there_before_torch_could_be(name: str) -> None:
    arguments = [name] if name else []
    heavy = "{'torch', 'transformers', 'numpy', 'scipy', 'matplotlib', 'rich', 'tokenizers'}"
    program = (
        f"import sys\nfrom rlprior.cli import main\ntry:\n    main({[*arguments, '--help']})\n"
        f"except SystemExit as end:\n    assert end.code == 0\nassert not {heavy} & set(sys.modules), sys.modules.keys()"
    )
    text = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    examples = command_module(name).EXAMPLES if name else COMMANDS
    assert all(example in text for example in examples)
    # the best of three, because other programs share the machine
    assert min(help_seconds(*arguments) for _ in range(3)) < 0.5


def test_every_example_of_the_help_can_be_parsed() -> None:
    for name in COMMANDS:
        for example in command_module(name).EXAMPLES:
            words = shlex.split(example)
            known, rest = cli._build_parser().parse_known_args(words[words.index("rlprior") + 1 :])
            cli._overrides(known.command, rest)


def test_version_and_exit_codes_of_the_module() -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"rlprior {rlprior.__version__}\n")
    done = run_cli("study", "missing.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rlprior: missing.toml: no such file; give the path of a TOML file\n"


# Plans


def test_dry_runs_print_the_plan_and_write_nothing(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_toml(tmp_path / "study.toml", study_tables())
    write_toml(tmp_path / "train.toml", train_tables())
    write_toml(tmp_path / "rl.toml", rl_tables())
    write_toml(tmp_path / "evaluate.toml", evaluate_tables())
    before = files_below(tmp_path)
    model = str(last_checkpoint(trained))
    commands = {
        ("demo",): ("data", "pretrain beta_low s0", "evaluate rl head s0"),
        ("demo", "--seeds", "3", "4"): ("pretrain ce s3", "rl tail s4"),
        ("study", "study.toml"): ("pretrain ce s0", "evaluate midtrain sharp s0"),
        ("train", "train.toml"): ("data", "pretrain train"),
        ("train", "train.toml", "--init-from", model): ("midtrain train",),
        ("rl", "rl.toml", "--init-from", model): ("rl rl",),
        ("evaluate", model, "--config", "evaluate.toml"): ("data", "evaluate step-00000006"),
    }
    for arguments, labels in commands.items():
        assert main([*arguments, "--dry-run"]) == 0
        captured = capsys.readouterr()
        lines = [line.strip() for line in captured.out.splitlines()]
        for label in labels:
            assert any(line.startswith(f"{label} ") and " to do " in line for line in lines), (
                arguments,
                label,
            )
        assert captured.err == ""
        assert files_below(tmp_path) == before


def test_a_plan_of_many_steps_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(tmp_path / "study.toml", study_tables())
    assert main(["study", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert " FLOPs" in text
    assert "about " in text
    assert "on 2 process(es)" in text


# Work


def test_train_rl_and_evaluate_one_after_the_other(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mid = study_tables()["midtrain"]
    tables = {**train_tables(), "training": mid}
    # the same text and tokenizer settings give the tokenizer that the model was trained with
    arguments = [
        "train",
        str(write_toml(tmp_path / "mid.toml", tables)),
        "--init-from",
        str(last_checkpoint(trained)),
    ]
    assert main(arguments) == 0
    assert f"outputs: {tmp_path / 'runs' / 'mid'}" in capsys.readouterr().out
    model = checkpoint_directory(tmp_path / "runs" / "mid", mid["num_steps"])
    rl = [
        "rl",
        str(write_toml(tmp_path / "rl.toml", rl_tables())),
        "--init-from",
        str(model),
        "--rl.num_steps=2",
    ]
    assert main(rl) == 0
    assert len(read_jsonl(tmp_path / "runs" / "rl" / "metrics.jsonl")) == 2
    config = write_toml(tmp_path / "evaluate.toml", evaluate_tables())
    final = checkpoint_directory(tmp_path / "runs" / "rl", 2)
    for name in ("", "done already"):
        capsys.readouterr()
        assert main(["evaluate", str(final), "--config", str(config), "--out", "runs/scores"]) == 0
        text = capsys.readouterr().out
        assert "held-out text (" in text
        assert "sums (8 problems): Avg@4" in text
        assert f"evaluate step-00000002: {name or 'done'}" in text


def test_settings_are_replaced_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_toml(tmp_path / "train.toml", train_tables())
    overrides = [
        "--training.num_steps=2",
        "--training.eval_every=0",
        "--seed=5",
        "--data.sources.0.num_problems=50",
        '--training.objective={name="reward_shaping", beta=0.5}',
        "--model.preset=tiny",
    ]
    assert main(["train", str(path), "--out", "here", *overrides]) == 0
    manifest = json.loads((tmp_path / "here" / "manifest.json").read_text())
    assert manifest["config"]["seed"] == 5
    assert manifest["config"]["training"]["num_steps"] == 2
    assert manifest["config"]["training"]["objective"]["beta"] == 0.5
    (data,) = tmp_path.glob("data-*")
    assert json.loads((data / "manifest.json").read_text())["config"]["sources"][0]["num_problems"] == 50
    assert len(read_jsonl(tmp_path / "here" / "metrics.jsonl")) == 2


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_module("report"), "run", interrupt)
    assert main(["report", "x"]) == 130
    assert (
        capsys.readouterr().err == "\nrlprior: stopped; the same command goes on from the last checkpoint\n"
    )
