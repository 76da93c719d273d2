"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprior.training.schedule import ScheduleConfig, learning_rate


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, int]:
    """A schedule whose warmup and decay do not overlap, and the number of steps."""
    warmup, stable, decay = draw(st.tuples(*[st.integers(0, 40)] * 3).filter(any))
    peak = draw(st.floats(1e-8, 10))
    schedule = ScheduleConfig(
        peak_learning_rate=peak,
        final_learning_rate=draw(st.floats(0, 1)) * peak,
        warmup_steps=warmup,
        decay_steps=decay,
        decay=draw(st.sampled_from(["linear", "cosine"])),
    )
    return schedule, warmup + stable + decay


@given(schedules())
def test_it_rises_stays_and_falls(case: tuple[ScheduleConfig, int]) -> None:
    schedule, num_steps = case
    peak, final = schedule.peak_learning_rate, schedule.final_learning_rate
    first_decaying = num_steps - schedule.decay_steps + 1
    rates = {step: learning_rate(schedule, step, num_steps) for step in range(1, num_steps + 1)}
    rounding = 4e-16 * peak  # two additions in float64
    for step, rate in rates.items():
        if step < schedule.warmup_steps:
            assert rate == pytest.approx(peak * step / schedule.warmup_steps)
        elif step < first_decaying:
            assert rate == peak
        else:
            assert final - rounding <= rate <= peak + rounding
            if step > first_decaying:
                assert rate <= rates[step - 1] + rounding
    if schedule.decay_steps:
        assert rates[num_steps] == pytest.approx(final, abs=rounding)
        # the first decaying step has moved away from the peak already
        if final < 0.9 * peak:
            assert rates[first_decaying] < peak
    else:
        assert rates[num_steps] == peak


@given(schedules(), st.data())
def test_it_is_a_function_of_the_step_alone(case: tuple[ScheduleConfig, int], data: st.DataObject) -> None:
    schedule, num_steps = case
    step = data.draw(st.integers(1, num_steps))
    alone = learning_rate(schedule, step, num_steps)
    for other in range(1, num_steps + 1):
        learning_rate(schedule, other, num_steps)
    assert learning_rate(schedule, step, num_steps) == alone


def test_linear_and_cosine_by_hand() -> None:
    def rates(decay: Any) -> list[float]:
        schedule = ScheduleConfig(
            peak_learning_rate=3.0, final_learning_rate=1.0, warmup_steps=3, decay_steps=4, decay=decay
        )
        return [learning_rate(schedule, step, 9) for step in range(1, 10)]

    assert rates("linear") == pytest.approx([1, 2, 3, 3, 3, 2.5, 2, 1.5, 1])
    half = math.sqrt(0.5)
    assert rates("cosine") == pytest.approx([1, 2, 3, 3, 3, 2 + half, 2, 2 - half, 1])


def test_the_defaults_are_the_papers_pre_training() -> None:
    assert learning_rate(ScheduleConfig(), 1, 10_000) == pytest.approx(3e-4 / 2000)
    assert learning_rate(ScheduleConfig(), 2000, 10_000) == 3e-4
    assert learning_rate(ScheduleConfig(), 10_000, 10_000) == 3e-4


def test_warmup_and_decay_may_overlap_in_a_short_run() -> None:
    schedule = ScheduleConfig(peak_learning_rate=1.0, final_learning_rate=0.0, warmup_steps=4, decay_steps=4)
    assert [learning_rate(schedule, step, 4) for step in range(1, 5)] == [0.25 * 0.75, 0.25, 0.75 * 0.25, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak_learning_rate": 0.0}, "peak_learning_rate must be above 0, not 0.0"),
        ({"peak_learning_rate": math.nan}, "peak_learning_rate must be above 0, not nan"),
        ({"peak_learning_rate": math.inf}, "peak_learning_rate must be above 0, not inf"),
        ({"final_learning_rate": 1e-3}, "between 0 and peak_learning_rate, not 0.001"),
        ({"final_learning_rate": -1e-9}, "between 0 and peak_learning_rate, not -1e-09"),
        ({"final_learning_rate": math.nan}, "between 0 and peak_learning_rate, not nan"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, not -1"),
        ({"decay_steps": -1}, "decay_steps must be 0 or more, not -1"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**changes)
