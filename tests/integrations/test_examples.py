"""The examples of the integrations run as they stand."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integrations import titan_double

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "loss"


@pytest.mark.parametrize("name", ["plain_loop", "liger_style"])
def test_examples_that_need_torch_alone(name: str):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


# trl switches gradient checkpointing on under the name that transformers is about to drop
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
# in this process, which has paid for the imports already
@pytest.mark.parametrize("name", ["huggingface_trainer", "trl_sft", "torchtitan_config"])
def test_examples_that_need_a_trainer(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if name == "torchtitan_config":
        titan_double.install(monkeypatch)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


def test_every_example_is_run():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"plain_loop", "liger_style", "huggingface_trainer", "trl_sft", "torchtitan_config"}
