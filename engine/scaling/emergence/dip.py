"""Hartigan's dip test: whether a sample has one mode (Hartigan and Hartigan 1985).

The dip is the largest distance of the sample's distribution function from the nearest one with a single mode, which is
convex before the mode and concave after it. p is by uniform samples, the single-moded ones whose dips are largest.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.scaling.terms import Array

#: uniform samples for p
SIMULATED = 2000
#: with fewer values even two tight lumps are hardly told from chance
FEWEST = 8


def dip(values: Array) -> float:
    """The dip of a sample [n], from 1 / (2 n) to 1/4.

    Hartigan and Hartigan's way: the modal interval shrinks to where the convex minorant and the concave majorant of the
    distribution function are farthest apart, and the dip is the most that either bends away from it outside.
    """
    place = np.sort(np.asarray(values, dtype=np.float64))
    count = len(place)
    first, last, found = 0, count - 1, 1.0
    while first < last:
        below, above = _hull(place, first, last, 1.0), _hull(place, first, last, -1.0)
        places = np.concatenate([below, above])
        apart = np.interp(place[places], place[above], above + 1.0) - np.interp(place[places], place[below], below)
        widest = int(places[np.argmax(apart)])
        if np.argmax(apart) < len(below):
            new_first, new_last = widest, int(above[above >= widest].min())
        else:
            new_first, new_last = int(below[below <= widest].max()), widest
        if apart.max() <= found:
            break
        left, right = np.arange(first, new_first + 1), np.arange(new_last, last + 1)
        bends = left + 1.0 - np.interp(place[left], place[below], below)
        bends_above = np.interp(place[right], place[above], above + 1.0) - right
        found = max(found, bends.max(), bends_above.max())
        if (new_first, new_last) == (first, last):
            break
        first, last = new_first, new_last
    return float(found / (2 * count))


def _hull(place: Array, first: int, last: int, sign: float) -> NDArray[np.intp]:
    """Indices of the vertices of the largest convex function below the points (place_i, i), or, with sign -1, of the
    smallest concave one above them."""
    vertices: list[int] = []
    for index in range(first, last + 1):
        while len(vertices) > 1:
            before, middle = vertices[-2:]
            turn = (middle - before) * (place[index] - place[before]) - (index - before) * (
                place[middle] - place[before]
            )
            if sign * turn < 0.0:
                break
            vertices.pop()
        vertices.append(index)
    return np.array(vertices)


def dip_test(values: Array) -> tuple[float, float]:
    """The dip of a sample [n] and the probability of one as large if the sample had one mode."""
    found = dip(values)
    drawn = _uniform_dips(len(values))
    return found, float((1 + (drawn >= found).sum()) / (1 + len(drawn)))


@lru_cache
def _uniform_dips(count: int) -> Array:
    random = np.random.default_rng(count)
    return np.array([dip(sample) for sample in random.random((SIMULATED, count))])
