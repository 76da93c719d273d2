"""The head's threshold against sorting, on inputs made to mislead a search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprior.objectives import selection

METHODS = ("counting", "blocks")


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    """Send every vocabulary down one of the two paths."""
    monkeypatch.setattr(selection, "MIN_TWO_LEVEL_VOCABULARY", 0 if request.param == "blocks" else 10**9)
    return request.param


def head_by_sorting(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    rows = []
    for row in logits.tolist():
        ranked = sorted((z for z in row if z != -torch.inf), reverse=True)
        last = ranked[min(top_k, len(ranked)) - 1] if ranked else torch.inf
        rows.append([z >= last for z in row])
    return torch.tensor(rows)


def assert_head_is_right(logits: torch.Tensor, top_k: int) -> None:
    before = logits.clone()
    candidates = selection.find_candidates(logits, top_k)
    threshold = selection.head_threshold(candidates, torch.full_like(logits, torch.nan))
    assert torch.equal(logits, before)
    expected = head_by_sorting(logits, top_k)
    assert torch.equal(logits >= threshold, expected)
    for for_all in (False, True):
        head = selection.find_head(candidates, threshold, torch.full_like(logits, torch.nan), for_all=for_all)
        assert head.is_member_NC.dtype == logits.dtype
        is_member = torch.zeros_like(logits)
        if head.columns_NC is None:
            is_member = head.is_member_NC
        else:
            is_member.scatter_add_(
                1, head.columns_NC, head.is_member_NC
            )  # a column listed twice would give 2
        assert torch.equal(is_member, expected.to(logits.dtype))


def misleading_rows(columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(columns, generator=generator)
    ramp = torch.arange(columns, dtype=torch.float32)
    return torch.stack(
        [
            normal,
            normal.exp().exp(),  # a tail so heavy that interpolation creeps
            normal.round(),  # nearly everything ties
            torch.zeros(columns),
            torch.where(ramp == 3, 1e30, 0.0),  # squares overflow
            torch.where(ramp % 3 == 0, -torch.inf, normal),
            torch.where(ramp == 5, 0.0, -torch.inf),
            1 + ramp * 2**-23,  # neighbouring floats
            -ramp,  # the head in one corner of the columns
            ramp,
            normal * 1e-30,
            torch.full((columns,), -torch.inf),
            normal.bfloat16().float(),
        ]
    )


@pytest.mark.parametrize("top_k", [1, 2, 7, 100, 101, 999, 1000, 1001, 5000])
@pytest.mark.parametrize("columns", [1000, 1009])
def test_misleading_rows(method, top_k, columns):
    assert_head_is_right(misleading_rows(columns), top_k)
    assert_head_is_right(misleading_rows(columns).double(), top_k)


def test_the_default_paths_on_both_sides_of_the_switch():
    for columns in (selection.MIN_TWO_LEVEL_VOCABULARY - 1, selection.MIN_TWO_LEVEL_VOCABULARY + 1):
        assert_head_is_right(misleading_rows(columns), 100)


@pytest.mark.parametrize("num_passes", [0, 1, 3, 40])
def test_the_passes_decide_the_speed_and_never_the_result(monkeypatch, num_passes):
    monkeypatch.setattr(selection, "NUM_COUNTING_PASSES", num_passes)
    assert_head_is_right(misleading_rows(500), 20)


@pytest.mark.parametrize("two_level_from", [0, 10**9], ids=["blocks", "counting"])
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=40, max_size=40), min_size=1, max_size=4),
    top_k=st.integers(1, 45),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_small_integers(two_level_from, rows, top_k):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "MIN_TWO_LEVEL_VOCABULARY", two_level_from)
        assert_head_is_right(torch.tensor(rows, dtype=torch.float32), top_k)
