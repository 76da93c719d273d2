"""`rlprior plan`: presets, files and studies on the command line, what is printed, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.small_study import study_tables, train_tables, write_toml

from rlprior.cli import main
from rlprior.models.causal_lm import huggingface_config
from rlprior.models.presets import PRESETS


def planned(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The plans of a command by stage."""
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("preset", ["1b", "4b", "5b-a0.3b", "10b-a0.5b"])
def test_the_papers_presets_have_their_memory(capsys: pytest.CaptureFixture[str], preset: str) -> None:
    [plan] = planned(capsys, "--model", preset, "--devices", "64").values()
    # by the same arithmetic as in tests/training/test_memory.py, on the whole
    totals = {"1b": 1_048_211_968, "4b": 4_022_468_096, "5b-a0.3b": 4_803_424_256, "10b-a0.5b": 9_529_054_720}
    assert plan["parameters"]["total"] == totals[preset]
    assert plan["memory_bytes"]["loss"]["weights"] == 4 * totals[preset] / 64
    assert plan["cpu_bytes"]["start_per_process"] == 4 * totals[preset]
    assert plan["checkpoint_bytes"] == {"weights": 4 * totals[preset], "optimizer": 8 * totals[preset]}
    assert plan["peak"]["bytes"] == max(sum(kinds.values()) for kinds in plan["memory_bytes"].values())
    assert plan["fits"]
    assert plan["remedy"] is None
    # 500B tokens in whole steps of 16,777,216
    assert plan["tokens"] == 29_802 * 16_777_216
    assert plan["days"] == pytest.approx(plan["tokens"] / plan["tokens_per_second"] / 86_400)


def test_a_preset_takes_settings_as_a_file_does(capsys: pytest.CaptureFixture[str]) -> None:
    [plan] = planned(
        capsys,
        *("--model", "tiny", "--devices", "2", "--device", "cpu", "--vocab-size", "300"),
        *("--sequence-length", "64", "--batch-tokens", "1024", "--tokens", "10240"),
        *("--model.num_layers=1", "--training.engine.activation_checkpointing=full"),
        "--training.micro_batch_tokens=128",
    ).values()
    assert plan["activation_checkpointing"] == "full"
    assert (plan["micro_batch_tokens"], plan["micro_batches"], plan["tokens"]) == (128, 4, 10_240)
    assert plan["precision"] == "float32"
    assert plan["days"] is None
    # attention 128 x (128 + 64 + 64 + 128), network 3 x 128 x 352, norms 2 x 128 + 2 x 32 + 128, embeddings 300 x 128
    assert plan["parameters"]["total"] == 49_152 + 135_168 + 448 + 38_400


def test_a_file_of_train_is_planned_as_it_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_toml(tmp_path / "train.toml", train_tables("training.engine={shard_size=2}"))
    plans = planned(capsys, file, "--devices", "4", "--training.precision=bfloat16")
    assert list(plans) == ["pretrain"]
    plan = plans["pretrain"]
    assert (plan["devices"], plan["shard_size"], plan["precision"]) == (4, 2, "bfloat16")
    assert (plan["micro_batch_tokens"], plan["micro_batches"]) == (64, 1)
    # 32 x (32 + 16 + 16 + 32), 3 x 32 x 64, norms 2 x 32 + 2 x 16 + 32; a tokenizer of at most 300 entries
    assert plan["parameters"]["total"] == 3072 + 6144 + 128 + 300 * 32
    assert not (tmp_path / "runs").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["train.toml"]


def test_a_study_is_planned_stage_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = planned(capsys, write_toml(tmp_path / "study.toml", study_tables()), "--devices", "1")
    assert list(plans) == ["pretrain", "midtrain"]
    assert [plan["tokens"] for plan in plans.values()] == [6 * 256, 4 * 256]
    # rows of 64 and 128: the same tokens at a time, twice the mask
    assert (
        plans["midtrain"]["memory_bytes"]["loss"]["attention masks"]
        == 2 * (plans["pretrain"]["memory_bytes"]["loss"]["attention masks"])
    )


@pytest.mark.parametrize("preset", ["1b", "10b-a0.5b"])
def test_mid_training_is_planned_for_the_model_that_it_starts_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    huggingface_config(PRESETS[preset], 1000).save_pretrained(tmp_path / "start")
    file = write_toml(tmp_path / "train.toml", {**train_tables(), "init_from": str(tmp_path / "start")})
    plan = planned(capsys, file, "--devices", "4")["midtrain"]
    [expected] = planned(capsys, "--model", preset, "--vocab-size", "1000").values()
    assert plan["parameters"] == expected["parameters"]


def test_a_person_reads_what_fits_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "4b", "--devices", "8", "--memory", "45"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "4b: 4.02B parameters, 3.63B active without embeddings\n8 devices (h100, 45 GB); bfloat16;"
    )
    for part in (
        "gathered weights and gradients in flight",
        "attention masks",
        "does not fit: ",
        "it would with activation_checkpointing = ",
        "CPU memory at the start: 16.09 GB a process, 128.72 GB for 8 on a node",
        "a checkpoint: 48.27 GB, of which weights 16.09 GB",
        "2.78e+10 a token",
        "if the model FLOPs utilisation is 40%",
    ):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 120
    assert main(["plan", "--model", "4b", "--devices", "64"]) == 0
    assert "\nfits: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "one of the arguments FILE.toml --model is required; see 'rlprior plan --help'"),
        (["plan", "--model", "4bb"], "--model 4bb: model: preset = '4bb' is unknown; known: tiny"),
        (["plan", "none.toml"], "none.toml: no such file; give the path of a TOML file"),
        (["plan", "none.toml", "--tokens", "1e9"], "--tokens goes with --model; a file says it itself"),
        (["plan", "none.toml", "--model", "4b"], "not allowed with argument"),
        (["plan", "--model", "4b", "--device", "tpu"], "--device tpu is unknown; known: a100, h100-pcie"),
        (["plan", "--model", "4b", "--devices", "0"], "--devices 0 must be at least 1"),
        (["plan", "--model", "4b", "--devices", "48"], "a batch of 4096 rows (batch_tokens / sequence_length) cannot be"),
        (["plan", "--model", "4b", "--memory", "-1"], "--memory -1.0 must be above 0"),
        (["plan", "--model", "4b", "--memory", "nan"], "--memory nan must be above 0"),
        (["plan", "--model", "4b", "--mfu", "40"], "--mfu 40.0 must be above 0 and at most 1"),
        (["plan", "--model", "4b", "--tokens", "0"], "--tokens and --vocab-size must be at least 1"),
        (["plan", "--model", "4b", "--tokens", "inf"], "--tokens and --vocab-size must be at least 1"),
        (["plan", "--model", "4b", "--batch-tokens", "5000"], "batch_tokens = 5000 must be a multiple of sequence_length = 4096"),
        (["plan", "--model", "4b", "--training.engin.x=1"], "unknown key 'training.engin'; did you mean 'engine'?"),
        (["plan", "--model", "4b", "--data.seed=1"], "--data: with --model there are the settings"),
        (["plan", "--model", "4b", "--training.engine.shard_size=5"], "engine.shard_size = 5 must divide the 8 devices"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlprior: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a Hugging Face model folder (config.json is missing or damaged)"),
        ("[", "not a Hugging Face model folder (config.json is missing or damaged)"),
        ('{"model_type": "gpt2"}', "its model_type is 'gpt2'; planned are 'qwen3' and 'dots1' alone"),
    ],
)
def test_a_start_that_cannot_be_planned_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    file = write_toml(tmp_path / "train.toml", {**train_tables(), "init_from": str(tmp_path)})
    assert main(["plan", str(file), "--devices", "1"]) == 2
    assert message in capsys.readouterr().err


HELP_WITHOUT_TORCH = """
import sys
from rlprior.cli import main
try:
    main(["plan", "--help"])
except SystemExit as end:
    sys.exit(end.code or int("torch" in sys.modules))
"""


def test_help_comes_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_TORCH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "rlprior plan --model 4b --devices 64 --tokens 500e9" in done.stdout


def test_a_file_whose_tokenizer_is_not_there_yet_is_planned_with_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(Path(__file__).parents[2] / "configs" / "paper" / "pretrain.toml")
    there = f"--data_dir={tmp_path}"
    assert main(["plan", file, there]) == 2
    assert "before it is there, say how many entries it has: --vocab-size N" in capsys.readouterr().err
    assert main(["plan", file, there, "--devices", "64", "--vocab-size", "151936"]) == 0
    assert "pretrain: 4.02B parameters" in capsys.readouterr().out
