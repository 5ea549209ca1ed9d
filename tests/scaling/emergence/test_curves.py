"""Curves against an exhaustive search, spans that mean what they say, and levels within their bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from engine.scaling.emergence.curves import Bounds, fit, levels
from engine.scaling.emergence.shapes import SIGMOIDS, changes, shape, smooth
from tests.scaling.emergence.studies import ladder, noisy

UNIT = Bounds((0.0, 1.0), (0.0, 1.0))


@pytest.mark.parametrize("link", SIGMOIDS)
def test_a_span_is_from_a_tenth_to_nine_tenths_of_the_rise(link: str) -> None:
    place = np.linspace(-1.0, 2.0, 30_001)
    values = shape(link, 0.4, 0.7, place)
    ends = np.interp([0.1, 0.5, 0.9], values, place)
    assert ends[1] == pytest.approx(0.4, abs=1e-4)
    assert ends[2] - ends[0] == pytest.approx(0.7, abs=1e-3)


def test_levels_are_those_of_bounded_least_squares() -> None:
    random = np.random.default_rng(0)
    shapes, scores, weights = random.random((5, 9)), 2 * random.random((4, 9)) - 0.5, random.random((4, 9)) + 0.1
    for bounds in (Bounds(), UNIT, Bounds((0.2, 0.2), (0.0, 1.0))):
        low, high, value = levels(shapes, scores, weights, bounds)
        for row, column in np.ndindex(4, 5):
            root = np.sqrt(weights[row])
            design = np.stack([1 - shapes[column], shapes[column]], axis=1) * root[:, None]
            (before, before_end), (after, after_end) = bounds.before, bounds.after
            limits = ([before, after], [before_end + 1e-12, after_end + 1e-12])
            found = lsq_linear(design, scores[row] * root, limits, tol=1e-14)
            assert value[row, column] == pytest.approx(2 * found.cost, rel=1e-6)
            assert [low[row, column], high[row, column]] == pytest.approx(found.x, abs=1e-4)


def test_the_search_finds_what_an_exhaustive_one_does() -> None:
    place = ladder()
    scores = np.stack([noisy(0.1 + 0.6 * shape("gompertz", 0.5, 0.5, place), 0.02, seed) for seed in range(6)])
    weights = np.ones_like(scores)
    for family in (smooth(), *changes(place)):
        found = fit([family], place, scores, weights, UNIT)
        spans = np.geomspace(family.spans[0], family.spans[-1], 40 if len(family.spans) > 1 else 1)
        centres = np.linspace(family.centres[0], family.centres[-1], 120) if family.refined else family.centres
        finer = replace(family, centres=centres, spans=spans)
        grids = [(link, *finer.grid(link)) for link in family.links]
        dense = np.concatenate([shape(link, centre[:, None], span[:, None], place) for link, centre, span in grids])
        exhaustive = levels(dense, scores, weights, UNIT)[2].min(axis=1)
        assert (found.value <= exhaustive * 1.001).all()
        residuals = scores - found.at(place)
        assert (residuals**2).sum(axis=1) == pytest.approx(found.value)


def test_a_change_has_two_sizes_before_it() -> None:
    place = ladder(5, 1)
    for family in changes(place):
        assert family.centres.min() >= place[1]
