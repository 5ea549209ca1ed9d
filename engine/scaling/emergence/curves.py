"""Curves of scores over an axis, fitted to many resamples at once by weighted least squares.

At a given shape a curve is linear in its two levels, so the search is over place and span alone (variable projection,
Golub and Pereyra 1973): all shapes of a grid, then finer and finer grids around the best. So it can't end in another
local minimum than that of the grid.

Shapes: R resamples, n points, K candidate shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.scaling.emergence.shapes import Family, shape
from engine.scaling.terms import Array

#: refinements of the grid, each twice as fine as the one before
REFINEMENTS = 7
_OFFSETS = np.array([-1.0, 0.0, 1.0])
#: resamples at once, so that temporary arrays stay in the cache
ROWS = 64


@dataclass(frozen=True)
class Bounds:
    """Where the levels before and after a rise may be."""

    before: tuple[float, float] = (-np.inf, np.inf)
    after: tuple[float, float] = (-np.inf, np.inf)


@dataclass(frozen=True)
class Curves:
    """A curve for each of R resamples."""

    family: NDArray[np.str_]
    """name of the family that the curve is of [R]"""
    link: NDArray[np.str_]
    centre: Array
    span: Array
    before: Array
    """level far before the rise [R]"""
    after: Array
    """level far after it; of a kink and an exponential that at place 1"""
    value: Array
    """weighted sum of squares [R]"""

    def at(self, place: Array) -> Array:
        """Values [R, m] at places [m], or at one's own [R, m]."""
        result = np.empty((len(self.link), place.shape[-1]))
        each = np.broadcast_to(place, result.shape)
        for link in np.unique(self.link):
            rows = self.link == link
            part = shape(str(link), self.centre[rows, None], self.span[rows, None], each[rows])
            result[rows] = self.before[rows, None] * (1.0 - part) + self.after[rows, None] * part
        return result

    def rows(self, which: NDArray[np.bool_]) -> tuple[NDArray, ...]:  # type: ignore[type-arg]
        return tuple(getattr(self, name)[which] for name in self.__dataclass_fields__)


def fit(families: Sequence[Family], place: Array, scores: Array, weights: Array, bounds: Bounds) -> Curves:
    """The best curve of any family for each resample.

    Args:
        place: [n], that of all resamples.
        scores: [R, n].
        weights: [R, n].
    """
    found = [_fit_family(family, place, scores, weights, bounds) for family in families]
    best = np.argmin([curves.value for curves in found], axis=0)
    columns = zip(*(curves.rows(np.ones(len(scores), bool)) for curves in found), strict=True)
    return Curves(*(np.stack(column)[best, np.arange(len(scores))] for column in columns))


def _fit_family(family: Family, place: Array, scores: Array, weights: Array, bounds: Bounds) -> Curves:
    shapes = family.shapes(place)
    best, values, before, after = (np.empty(len(scores), kind) for kind in (np.intp, float, float, float))
    for first in range(0, len(scores), ROWS):
        part = slice(first, first + ROWS)
        low, high, value = levels(shapes, scores[part], weights[part], bounds)
        chosen = np.argmin(value, axis=1)
        rows = np.arange(len(chosen))
        best[part], values[part] = chosen, value[rows, chosen]
        before[part], after[part] = low[rows, chosen], high[rows, chosen]
    links, centres, spans = (column[best] for column in family.grid())
    name = np.full(len(scores), family.name)
    curves = Curves(name, links, centres, spans, before, after, values)
    return _refine(curves, family, place, scores, weights, bounds) if family.refined else curves


def _refine(curves: Curves, family: Family, place: Array, scores: Array, weights: Array, bounds: Bounds) -> Curves:
    """Finer grids around each resample's best shape."""
    spans = np.log(family.spans)
    widths = [float(np.diff(axis)[0]) if len(axis) > 1 else 0.0 for axis in (family.centres, spans)]
    offsets = [_OFFSETS if width else np.zeros(1) for width in widths]
    steps = np.stack([axis.ravel() for axis in np.meshgrid(*offsets, indexing="ij")], axis=1)
    state = np.stack([curves.centre, np.log(curves.span), curves.before, curves.after, curves.value], axis=1)
    for link in np.unique(curves.link):
        limits = (family.limits(str(link)), (spans.min(), spans.max()))
        for rows in np.array_split(np.flatnonzero(curves.link == link), max(1, (curves.link == link).sum() // ROWS)):
            own, among = state[rows], np.arange(len(rows))
            for halving in 0.5 ** np.arange(1, REFINEMENTS + 1):
                tried = own[:, None, :2] + halving * steps * widths
                for axis, (least, most) in enumerate(limits):
                    tried[..., axis] = np.clip(tried[..., axis], least, most)
                shapes = shape(str(link), tried[..., :1], np.exp(tried[..., 1:]), place)
                low, high, value = levels(shapes, scores[rows], weights[rows], bounds)
                best = np.argmin(value, axis=1)
                new = np.column_stack([tried[among, best], *(each[among, best] for each in (low, high, value))])
                own = np.where(new[:, 4:] < own[:, 4:], new, own)
            state[rows] = own
    centre, span, before, after, value = state.T
    return Curves(curves.family, curves.link, centre, np.exp(span), before, after, value)


def levels(shapes: Array, scores: Array, weights: Array, bounds: Bounds) -> tuple[Array, Array, Array]:
    """Best levels before and after within their bounds, and the weighted sum of squares, each [R, K].

    A convex quadratic has its minimum over a rectangle inside, or on an edge.

    Args:
        shapes: [K, n], or each resample's own [R, K, n].
    """
    middle = (weights * scores).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    centred = scores - middle
    pulled, rest = weights * centred, 1.0 - shapes

    def total(values: Array, of: Array) -> Array:
        return values @ of.T if of.ndim == 2 else np.asarray(of @ values[:, :, None])[..., 0]

    aa, bb, ab = total(weights, rest * rest), total(weights, shapes * shapes), total(weights, rest * shapes)
    ya, yb, yy = total(pulled, rest), total(pulled, shapes), (pulled * centred).sum(axis=1, keepdims=True)

    def squares(low: Array, high: Array) -> Array:
        return np.asarray(yy - 2 * (low * ya + high * yb) + low * low * aa + 2 * low * high * ab + high * high * bb)

    tiny = 1e-300 + 1e-13 * aa * bb
    scale = np.maximum(aa * bb - ab * ab, tiny)
    low, high = (ya * bb - yb * ab) / scale, (yb * aa - ya * ab) / scale
    value = squares(low, high)
    (least_low, most_low), (least_high, most_high) = (
        (edge[0] - middle, edge[1] - middle) for edge in (bounds.before, bounds.after)
    )
    outside = (low < least_low) | (low > most_low) | (high < least_high) | (high > most_high)
    if outside.any():
        value = np.where(outside, np.inf, value)
        aa, bb = np.maximum(aa, 1e-300), np.maximum(bb, 1e-300)
        edges = [(edge, np.clip((yb - ab * edge) / bb, least_high, most_high)) for edge in (least_low, most_low)]
        edges += [(np.clip((ya - ab * edge) / aa, least_low, most_low), edge) for edge in (least_high, most_high)]
        for one, other in edges:
            if np.isfinite(one).all() and np.isfinite(other).all():
                tried = squares(one, other)
                better = tried < value
                value = np.where(better, tried, value)
                low, high = np.where(better, one, low), np.where(better, other, high)
    return low + middle, high + middle, np.maximum(value, 0.0)
