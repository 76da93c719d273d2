"""Shared set-up: one thread, no network, and skips that fail where CI must see everything."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # read when triton is imported, which nothing has done yet
    os.environ.setdefault("TRITON_INTERPRET", "1")

DATA_DIRECTORY = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real text and problems beside the checkout."""
    if not DATA_DIRECTORY.is_dir():
        pytest.skip("real data is not beside this checkout (../shared/data)")
    return DATA_DIRECTORY


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `rlprior train` makes of the small study's pre-training."""
    from tests.small_study import train_small_model

    return train_small_model(tmp_path_factory.mktemp("trained"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With RLPRIOR_NO_SKIPS set, a skip is a failure, unless it is for want of a GPU."""
    report = yield
    if report.skipped and os.environ.get("RLPRIOR_NO_SKIPS") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "GPU" not in reason:
            report.outcome = "failed"
            report.longrepr = f"skipped where nothing may be skipped: {reason}"
    return report
