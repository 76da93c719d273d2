"""The built-in study at a hundredth of its size, end to end through the real command, and every other command on what it made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.small_study import run_cli, write_toml

from rlprior.runs.files import read_jsonl

pytestmark = pytest.mark.slow

SMALLER = (
    "--data.tokenizer.vocab_size=400",
    "--data.tokenizer.max_training_bytes=200000",
    "--data.sources.0.max_bytes=300000",
    "--data.sources.2.num_problems=1000",
    "--model.num_layers=1",
    "--model.hidden_size=32",
    "--model.intermediate_size=64",
    "--pretrain.num_steps=40",
    "--pretrain.eval_every=20",
    "--midtrain.num_steps=40",
    "--midtrain.eval_every=20",
    "--rl.num_steps=4",
    "--rl.eval_every=2",
    "--rl.save_every=2",
    "--rl.prompts_per_step=2",
    "--rl.samples_per_prompt=4",
    "--rl.num_problems=50",
    "--evaluation.final.held_out_tokens=3000",
    "--evaluation.final.num_problems=20",
    "--evaluation.final.samples_per_problem=4",
    "--evaluation.intermediate.held_out_tokens=1000",
    "--evaluation.intermediate.num_problems=10",
    "--evaluation.intermediate.samples_per_problem=2",
)
ARMS = ("ce", "beta_low", "beta_high", "tail", "head")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished study; the command said where the report is, and nothing on the error stream."""
    directory = tmp_path_factory.mktemp("demo")
    done = run_cli(
        "demo", "--workers", "2", "--out", directory / "out", *SMALLER, cwd=directory, timeout_seconds=900
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert f"report: {directory / 'out' / 'report.html'}" in done.stdout
    assert "processor time by stage, all arms: data " in done.stdout
    assert {path.name for path in directory.iterdir()} == {"out"}
    return directory / "out"


def find(demo: Path, label: str) -> Path:
    (found,) = (demo / "runs").glob(f"{label}-????????????")
    return found


def test_the_report_compares_all_arms(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    study = json.loads((demo / "study.json").read_text())
    summary = json.loads((demo / "summary.json").read_text())
    assert [arm["name"] for arm in study["arms"]] == list(ARMS)
    assert all(arm["label"] in page for arm in study["arms"])
    assert summary
    assert study["command"].startswith("rlprior demo --workers 2 --out ")
    assert set(study["wall_seconds"]) == {"data", "pretrain", "midtrain", "rl", "evaluate"}
    assert "http://" not in re.sub(r"http://www\.w3\.org/[^\"']*", "", page), (
        "the page must not need the network"
    )
    pictures = list(demo.rglob("*.png"))
    assert len(pictures) >= 4
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_every_stage_of_every_arm_is_evaluated_on_the_same_set(demo: Path) -> None:
    for stage, steps in (("pretrain", [20, 40]), ("midtrain", [20, 40]), ("rl", [2, 4])):
        sets = set()
        for arm in ARMS:
            records = read_jsonl(find(demo, f"evaluate-{stage}-{arm}-s0") / "results.jsonl")
            assert [record["step"] for record in records] == steps
            final = records[-1]
            assert final["final"]
            assert sum(final["likelihood"]["num_tokens"]) >= 3000
            assert len(final["tasks"]["arithmetic"]["problem_ids"]) == 20
            sets.add((*final["likelihood"]["document_ids"], *final["tasks"]["arithmetic"]["problem_ids"]))
        assert len(sets) == 1


def test_arms_are_paired(demo: Path) -> None:
    """Equal weights and equal batches: the first step's plain cross-entropy is the same, and later ones are not."""
    first, last = set(), set()
    for arm in ARMS:
        metrics = read_jsonl(find(demo, f"pretrain-{arm}-s0") / "metrics.jsonl")
        first.add(round(metrics[0]["cross_entropy_nats"], 2))
        last.add(metrics[-1]["cross_entropy_nats"])
    assert len(first) == 1
    assert len(last) == len(ARMS)


def test_training_helps(demo: Path) -> None:
    """Even so little of it: better than frequencies alone, and better than before."""
    for arm in ARMS:
        records = read_jsonl(find(demo, f"evaluate-pretrain-{arm}-s0") / "results.jsonl")
        nats = [
            sum(record["likelihood"]["cross_entropy_nats"]) / sum(record["likelihood"]["num_tokens"])
            for record in records
        ]
        assert nats[1] < nats[0]
    for arm in ARMS:
        logged = read_jsonl(find(demo, f"midtrain-{arm}-s0") / "metrics.jsonl")
        assert logged[-1]["cross_entropy_nats"] < logged[0]["cross_entropy_nats"]
        assert logged[-1]["tokens"] == 80 * 1024


def test_a_second_call_executes_nothing(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.glob("runs/**/*") if path.is_file()}
    assert before
    done = run_cli("demo", "--out", demo, *SMALLER)
    assert (done.stderr, done.returncode) == ("", 0)
    assert " done\n" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in demo.glob("runs/**/*") if path.is_file()} == before


def test_report_alone_writes_the_same_page(demo: Path, tmp_path: Path) -> None:
    done = run_cli("report", demo, "--out", tmp_path / "page" / "report.html")
    assert (done.stderr, done.returncode) == ("", 0)
    assert (tmp_path / "page" / "report.html").read_bytes() == (demo / "report.html").read_bytes()


def test_other_commands_go_on_from_its_checkpoints(demo: Path, tmp_path: Path) -> None:
    model = find(demo, "midtrain-tail-s0") / "checkpoints" / "step-00000040"
    study = json.loads((demo / "study.json").read_text())["config"]
    data = {**study["data"], "tokenizer": {"path": str(model)}}
    training = {**study["midtrain"], "num_steps": 4, "save_every": 2}
    training.pop("objective", None)
    train = write_toml(tmp_path / "train.toml", {"data": data, "training": training})
    rl = write_toml(tmp_path / "rl.toml", {"rl": {**study["rl"], "num_steps": 2}})
    evaluate = write_toml(tmp_path / "evaluate.toml", {"data": data, "evaluation": study["evaluation"]})
    for arguments in (
        ["train", train, "--init-from", model, "--out", tmp_path / "more"],
        ["rl", rl, "--init-from", model, "--out", tmp_path / "rl"],
        ["evaluate", model, "--config", evaluate, "--out", tmp_path / "scores"],
    ):
        done = run_cli(*arguments, cwd=tmp_path)
        assert (done.stderr, done.returncode) == ("", 0), arguments
        assert f"outputs: {arguments[-1]}" in done.stdout
    assert read_jsonl(tmp_path / "more" / "metrics.jsonl")[-1]["tokens"] == 84 * 1024
    # the same model on the same text and questions: what the study found
    expected = read_jsonl(find(demo, "evaluate-midtrain-tail-s0") / "results.jsonl")[-1]
    found = read_jsonl(tmp_path / "scores" / "results.jsonl")[-1]
    assert found["likelihood"]["document_ids"] == expected["likelihood"]["document_ids"]
    assert found["tasks"] == expected["tasks"]
