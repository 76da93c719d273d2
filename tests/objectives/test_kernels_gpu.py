"""The Triton kernels at the sizes they are for."""

from __future__ import annotations

import pytest
import torch
from tests.objectives.kernel_cases import (
    DEVICE,
    SETTINGS,
    SHAPING,
    TOLERANCE,
    assert_within_budget,
    compute,
)

from rlprior.objectives import fused, linear
from rlprior.objectives.batch import TokenBatch
from rlprior.objectives.closed_form import Scratch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]


@pytest.mark.parametrize("objective_", SETTINGS, ids=lambda settings: settings.name)
@pytest.mark.parametrize("v", [151936, 50257])
def test_large_vocabularies_match_float64(bench, objective_, v):
    inputs = bench.make_inputs(n=70, v=v, d=32, scale=0.3)
    single = inputs.to(torch.float32)
    options = {"chunk_rows": 32}
    double = bench.inputs(
        single.hidden.double(), single.weight.double(), inputs.targets, inputs.token_weights
    )
    expected = bench.compute("chunked", objective_, double, "mean")
    bench.assert_agree(compute(bench, objective_, single, "mean", **options), expected, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective_", SETTINGS, ids=lambda settings: settings.name)
def test_low_precision_at_size(bench, dtype, objective_):
    assert_within_budget(bench.make_inputs(seed=5, n=5000, v=32003, d=64, scale=0.3).to(dtype), objective_)


def test_rows_beyond_31_bits():
    rows, columns = 16_500, 131_072
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_()
    targets = torch.randint(columns, (rows,), device=DEVICE)
    assert logits.numel() > 2**31
    last = logits[-3:].clone()
    plan = linear._plan(SHAPING, None, True, None, 0.0)
    results = []
    for chunk, chunk_targets in ((logits, targets), (last, targets[-3:].clone())):
        batch = TokenBatch(chunk_targets, None, None, None)
        ones = torch.ones(len(chunk), device=DEVICE)
        results.append(fused.evaluate_rows_(chunk, batch, plan, Scratch(), ones).loss[-3:])
    assert torch.equal(*results)
    assert torch.equal(logits[-3:], last)


def test_a_chunk_is_evaluated_without_waiting_for_the_gpu():
    plan = linear._plan(SHAPING, None, True, 30.0, 1e-4)
    ones = torch.ones(64, device=DEVICE)
    batch = TokenBatch(torch.zeros(64, dtype=torch.int64, device=DEVICE), None, None, None)
    logits = torch.randn(64, 32000, dtype=torch.bfloat16, device=DEVICE)
    fused.evaluate_rows_(logits, batch, plan, Scratch(), ones)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.evaluate_rows_(logits, batch, plan, Scratch(), ones)
    finally:
        torch.cuda.set_sync_debug_mode("default")
