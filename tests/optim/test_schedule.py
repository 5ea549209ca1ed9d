"""Schedules are pure functions of the step with the promised shapes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import OptimConfig
from engine.errors import UserError
from engine.optim.schedule import check_phases, learning_rate

TOTAL = 100


def rate(step: int, **values: object) -> float:
    return learning_rate(step, TOTAL, OptimConfig(learning_rate=1.0, **values))  # type: ignore[arg-type]


def test_warmup_rises_linearly_to_the_peak_and_moves_at_once() -> None:
    assert [rate(step, warmup=4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_linear_reaches_zero_after_the_last_step() -> None:
    assert rate(10, warmup=0.1) == 1.0
    assert rate(55, warmup=0.1) == pytest.approx(0.5)
    assert learning_rate(TOTAL, TOTAL, OptimConfig(learning_rate=1.0)) == 0.0


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rate(50, warmup=0, schedule="cosine") == pytest.approx(0.5)
    assert rate(25, warmup=0, schedule="cosine") == pytest.approx(0.5 + math.cos(math.pi / 4) / 2)


def test_polynomial_follows_its_power() -> None:
    assert rate(50, warmup=0, schedule="polynomial", power=2.0) == pytest.approx(0.25)
    assert rate(50, warmup=0, schedule="polynomial", power=0.5) == pytest.approx(math.sqrt(0.5))


def test_wsd_is_flat_and_then_falls() -> None:
    assert {rate(step, warmup=0.1, schedule="wsd", decay=0.2) for step in range(10, 81)} == {1.0}
    assert rate(90, warmup=0.1, schedule="wsd", decay=0.2) == pytest.approx(0.5)


def test_constant_stays_at_the_peak() -> None:
    assert {rate(step, warmup=0, schedule="constant") for step in range(TOTAL)} == {1.0}


def test_a_range_test_grows_by_the_same_factor_in_every_step() -> None:
    rates = [rate(step, warmup=0, schedule="range_test", min_ratio=1e-4) for step in range(TOTAL)]
    assert rates[0] == pytest.approx(1e-4)
    assert [later / earlier for earlier, later in pairwise(rates)] == pytest.approx([1e4 ** (1 / TOTAL)] * (TOTAL - 1))
    with pytest.raises(UserError, match=r"^optim.min_ratio: 0.0 is not allowed; optim.schedule range_test grows from"):
        OptimConfig(schedule="range_test").validate()


@given(
    step=st.integers(0, TOTAL - 1),
    name=st.sampled_from(["linear", "polynomial", "cosine", "wsd", "constant"]),
    floor=st.floats(0, 1),
    warmup=st.floats(0, 0.5),
)
def test_every_schedule_stays_between_its_floor_and_the_peak_after_warmup(
    step: int, name: str, floor: float, warmup: float
) -> None:
    value = rate(step, schedule=name, min_ratio=floor, warmup=warmup)
    lowest = floor if step >= round(warmup * TOTAL) else 0.0
    assert lowest - 1e-12 <= value <= 1.0 + 1e-12


@given(name=st.sampled_from(["linear", "polynomial", "cosine", "wsd", "constant"]), warmup=st.floats(0, 0.5))
def test_no_schedule_rises_after_warmup(name: str, warmup: float) -> None:
    rates = [rate(step, schedule=name, warmup=warmup) for step in range(round(warmup * TOTAL), TOTAL)]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates))


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.warmup: 200 steps .* 100 steps"):
        check_phases(OptimConfig(warmup=200), TOTAL)
    with pytest.raises(UserError, match="of decay exceed"):
        check_phases(OptimConfig(warmup=0.6, decay=0.5, schedule="wsd"), TOTAL)
