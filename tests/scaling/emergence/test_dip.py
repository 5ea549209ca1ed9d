"""The dip against its definition as a linear program, and what its test tells of one mode and of two."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from engine.scaling.emergence.dip import dip, dip_test
from engine.scaling.terms import Array


def defined(values: Array) -> float:
    """The least distance to a distribution function that is convex before a mode, a value, and concave after it."""
    place = np.sort(values)
    return min(_nearest(place, mode) for mode in range(len(place)))


def _nearest(place: Array, mode: int) -> float:
    """Unknowns: the function up to the mode [n], from the mode on [n], and the distance."""
    count = len(place)
    rows, limits = [], []

    def below(coefficients: dict[int, float], limit: float) -> None:
        row = np.zeros(2 * count + 1)
        for index, value in coefficients.items():
            row[index] += value
        rows.append(row)
        limits.append(limit)

    for index in range(count):
        left, distance = index if index <= mode else count + index, 2 * count
        right = index if index < mode else count + index
        below({left: 1.0, distance: -1.0}, index / count)
        below({left: -1.0, distance: -1.0}, -index / count)
        below({right: 1.0, distance: -1.0}, (index + 1) / count)
        below({right: -1.0, distance: -1.0}, -(index + 1) / count)
    below({mode: 1.0, count + mode: -1.0}, 0.0)
    for index in range(count - 1):
        sides = ([index, index + 1] if index + 1 <= mode else []) or [count + index, count + index + 1]
        below({sides[0]: 1.0, sides[1]: -1.0}, 0.0)
    for index in range(1, count - 1):
        before, after = np.diff(place)[index - 1 : index + 1]
        slopes = {index - 1: -1 / before, index: 1 / before + 1 / after, index + 1: -1 / after}
        if index + 1 <= mode:
            below(slopes, 0.0)
        elif index - 1 >= mode:
            below({count + key: -value for key, value in slopes.items()}, 0.0)
    costs = np.zeros(2 * count + 1)
    costs[-1] = 1.0
    return float(linprog(costs, np.array(rows), np.array(limits), bounds=[(0, 1)] * (2 * count) + [(0, 1)]).fun)


@pytest.mark.parametrize("seed", range(6))
def test_the_dip_is_the_least_distance_to_one_mode(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.random(9) ** random.integers(1, 4)
    if seed % 2:
        values[:5] -= 3 * random.random()
    assert dip(values) == pytest.approx(defined(values), abs=1e-7)


def test_dips_of_even_values_and_of_two_lumps_are_the_extremes() -> None:
    assert dip(np.arange(10.0)) == pytest.approx(1 / 20)
    lumps = np.concatenate([np.linspace(0, 1e-6, 50), np.linspace(1, 1 + 1e-6, 50)])
    assert dip(lumps) == pytest.approx(0.25, abs=1e-3)


def test_two_modes_are_found_and_one_is_not() -> None:
    random = np.random.default_rng(3)
    one = 0.3 + 0.05 * random.standard_normal(12)
    assert dip_test(one)[1] > 0.1
    two = np.where(np.arange(12) < 6, one, one + 0.6)
    assert dip_test(two)[1] < 0.01
