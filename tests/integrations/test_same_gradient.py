"""The table of ways of training: accumulation in any split, packing, and 1, 2 or 4 ranks give one gradient."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.ranks import NUM_RANKS, cells
from tests.integrations.small_models import (
    SHAPING,
    assert_same_gradients,
    examples,
    expected_gradients,
    expected_loss,
    gradients,
    num_targets,
    pad,
    small_model,
)
from tests.integrations.steps import LAYOUTS, Step
from tests.integrations.ways import WAYS
from torch import Tensor

import rlprior.integrations

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    # trl switches gradient checkpointing on under the name that transformers is about to drop
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    # trl warns that only flash attention is known to keep documents apart; the models' own masks do, as the gradient shows
    pytest.mark.filterwarnings("ignore:.*[Ff]lash"),
]


@functools.cache
def expected(family: str) -> dict[str, Tensor]:
    return expected_gradients(family=family)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, Any]]]:
    """What each rank found, by the number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.ranks", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {
        num_ranks: [torch.load(folder / f"{num_ranks}-{rank}.pt") for rank in range(num_ranks)]
        for num_ranks in NUM_RANKS
    }


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("way", "layout"), cells(1))
def test_any_split_and_packing(way: str, layout: str, tmp_path: Path):
    assert_same_gradients(WAYS[way].train(Step(LAYOUTS[layout], tmp_path)), expected(WAYS[way].family))


@pytest.mark.parametrize(
    ("num_ranks", "way", "layout"), [(number, *cell) for number in NUM_RANKS for cell in cells(number)]
)
def test_any_number_of_ranks(found: dict[int, list[dict[Any, Any]]], num_ranks: int, way: str, layout: str):
    for outcomes in found[num_ranks]:
        assert (way, layout) in outcomes, f"not reached after: {list(outcomes.values())[-1]}"
        outcome = outcomes[way, layout]
        assert not isinstance(outcome, str), outcome
        assert_same_gradients(outcome, expected(WAYS[way].family))


def test_every_integration_is_in_the_table():
    (folder,) = rlprior.integrations.__path__
    parts = {"__init__", "next_token", "patched"}
    modules = {path.stem for path in Path(folder).glob("*.py")} - parts
    assert {way.module for way in WAYS.values()} == {"", *modules}


@pytest.mark.parametrize("lost", range(len(examples())))
def test_a_lost_document_is_more_than_rounding(lost: int):
    """What the table calls equal is finer than any document's share, so that none can be left out or counted twice."""
    model, rows = small_model(), examples()
    kept = rows[:lost] + rows[lost + 1 :]
    expected_loss(model, pad(kept), SHAPING, num_targets(rows)).backward()
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients(model), expected("qwen3"))
