"""The benchmark of the losses: it runs, leaves no contender out without a reason, and the documentation quotes its numbers."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.loss import run
from bench.loss.contenders import find_contenders, find_liger_budget, label, liger

ROOT = Path(__file__).resolve().parents[2]
MODULE = [sys.executable, "-m", "bench.loss.run"]


@pytest.mark.slow
def test_a_small_benchmark_from_end_to_end(tmp_path: Path):
    out = tmp_path / "loss.json"
    options = ["--sizes", "128x8x300", "--chunk-sizes", "32", "--repeats", "2", "--out", str(out)]
    subprocess.run([*MODULE, *options], cwd=ROOT, check=True, timeout=600)
    content = json.loads(out.read_text())
    assert {"command", "dtype", "machine", "repeats", "slow", "results"} <= content.keys()
    assert [result["size"] for result in content["results"]] == ["128x8x300"]
    found, missing = find_contenders("cpu", [32])
    for result in content["results"]:
        assert result["contenders"].keys() | result["not_measured"].keys() == found.keys() | missing.keys()
        assert all(result["not_measured"].values())
        for name, row in result["contenders"].items():
            assert len(row["seconds"]) == 2, name
            assert row["median_seconds"] > 0
            assert isinstance(row["peak_bytes"], int)
            assert {f"time_over_{reference}" for reference in run.find_references(found)} <= row.keys()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = subprocess.run(
        [*MODULE, "--table", out], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert table.count("\n") == 2 + len(found) + len(missing)


def test_the_documentation_quotes_the_results():
    results = json.loads((ROOT / "bench" / "results" / "loss-cpu.json").read_text())["results"]
    assert run.format_table(results) in (ROOT / "docs" / "loss.md").read_text(encoding="utf-8")


def test_both_implementations_run_on_a_gpu_at_every_chunk_size():
    found, missing = find_contenders("cuda", [2048])
    assert {
        "rlprior_tail",
        "rlprior_triton_tail",
        "rlprior_triton_tail[2048]",
        "rlprior_tail[2048]",
    } <= found.keys()
    keywords: Any = found["rlprior_triton_tail"]
    assert keywords.keywords["implementation"] == "triton"
    for name in (*found, *missing):
        assert label(name)
    assert label("rlprior_triton_tail[2048]") == "rlprior, triton, `tail_reward=-0.1`, chunks of 2048"
    assert label("liger") == "Liger, the chunk that it chooses"


def test_slow_contenders_repeat_less_and_broken_ones_are_named(monkeypatch: pytest.MonkeyPatch):
    def run_once(seconds: float | None, inputs: Any) -> float:
        if seconds is None:
            raise RuntimeError("no such kernel\non this machine")
        return seconds

    contenders = {"plain": 1.0, "slow": 4.0, "broken": None, "rlprior_cross_entropy": 2.0}
    monkeypatch.setattr(run, "run_once", run_once)
    monkeypatch.setattr(run, "find_contenders", lambda *_: (dict(contenders), {"absent": "not installed"}))
    monkeypatch.setattr(run, "measure_memory", lambda *_: 7)
    arguments = argparse.Namespace(device="cpu", dtype="float32", chunk_sizes=[], repeats=5)
    result = run.measure("2x3x5", arguments)
    repeats = {name: len(row["seconds"]) for name, row in result["contenders"].items()}
    assert repeats == {"plain": 5, "slow": 3, "rlprior_cross_entropy": 5}
    assert result["not_measured"] == {"absent": "not installed", "broken": "no such kernel"}
    assert result["contenders"]["slow"]["time_over_plain"] == {"median": 4.0, "quartiles": [4.0, 4.0]}
    assert result["contenders"]["slow"]["time_over_rlprior_cross_entropy"]["median"] == 2.0


def liger_chunk(budget: int, num_rows: int, width: int, vocabulary: int) -> int:
    """As Liger 0.8.5 has it, in floats of the sizes that occur here."""
    chunks = math.ceil(vocabulary / (budget * width))
    return min(2 ** math.ceil(math.log2(math.ceil(num_rows / chunks))), num_rows)


@pytest.mark.parametrize("size", run.GPU_SIZES)
@pytest.mark.parametrize("rows", [2048, 4096])
def test_liger_at_a_matched_chunk(size: str, rows: int):
    num_rows, width, vocabulary = map(int, size.split("x"))
    budget = find_liger_budget(rows, num_rows, width, vocabulary)
    assert liger_chunk(budget, num_rows, width, vocabulary) == rows
    assert budget == 1 or liger_chunk(budget - 1, num_rows, width, vocabulary) < rows


def test_liger_is_called_with_that_budget(monkeypatch: pytest.MonkeyPatch):
    budgets: list[int] = []

    def double(hidden: Any, weight: Any, targets: Any, *, chunk_mem_const: int) -> torch.Tensor:
        budgets.append(chunk_mem_const)
        return torch.nn.functional.cross_entropy(hidden @ weight.T, targets)

    functional: Any = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = double
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    inputs = run.make_inputs("16x8x64", "cpu", torch.float32)
    losses = [float(liger(*inputs, rows=rows).detach()) for rows in (None, 2, 4, 16)]
    assert budgets == [1, 1, 2, 8]
    assert len(set(losses)) == 1
    with pytest.raises(ValueError, match="Liger takes no chunks of 3 rows"):
        liger(*inputs, rows=3)
