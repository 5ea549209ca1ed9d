"""Curves of scores over an axis, fitted to many resamples at once by weighted least squares.

At a given shape a curve is linear in its two levels, so the search is over place and span alone (variable projection,
Golub and Pereyra 1973): for each link all shapes of a grid, then smaller and smaller steps around the best.

Shapes: R resamples, n points, K candidate shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.scaling.emergence.shapes import Family, shape
from engine.scaling.terms import Array

#: rounds of a search around the best of the grid, which halves its steps where none is better
REFINEMENTS = 11
_OFFSETS = np.array([-1.0, 0.0, 1.0])
#: resamples at once, so that temporary arrays stay in the cache
ROWS = 128


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


def fit(families: Sequence[Family], place: Array, scores: Array, weights: Array, bounds: Bounds) -> Curves:
    """The best curve of any family for each resample.

    Args:
        place: [n], that of all resamples.
        scores: [R, n].
        weights: [R, n].
    """
    each = [(family, link) for family in families for link in family.links]
    found = [_fit_link(family, link, place, scores, weights, bounds) for family, link in each]
    best = np.argmin([state[:, 4] for state in found], axis=0)
    state = np.stack(found)[best, np.arange(len(scores))]
    names = (np.array(column)[best] for column in ([family.name for family, _ in each], [link for _, link in each]))
    return Curves(*names, *state.T)


def _fit_link(family: Family, link: str, place: Array, scores: Array, weights: Array, bounds: Bounds) -> Array:
    """Centre, span, levels before and after, and value of the best shape of a link for each resample [R, 5]."""
    centres, spans = family.grid(link)
    shapes = shape(link, centres[:, None], spans[:, None], place)
    parts = []
    for first in range(0, len(scores), ROWS):
        given = scores[first : first + ROWS], weights[first : first + ROWS]
        low, high, value = levels(shapes, *given, bounds)
        best = np.argmin(value, axis=1)
        rows = np.arange(len(best))
        state = np.column_stack([centres[best], spans[best], *(column[rows, best] for column in (low, high, value))])
        parts.append(_refine(state, family, link, place, *given, bounds) if family.refined else state)
    return np.concatenate(parts)


def _refine(
    state: Array, family: Family, link: str, place: Array, scores: Array, weights: Array, bounds: Bounds
) -> Array:
    """Smaller and smaller steps around each resample's best shape."""
    axes = (family.centres, np.log(family.spans))
    limits = (family.limits(link), (axes[1].min(), axes[1].max()))
    widths = np.array([float(np.diff(axis)[0]) if len(axis) > 1 else 0.0 for axis in axes])
    offsets = [_OFFSETS if width else np.zeros(1) for width in widths]
    steps = widths * np.stack([axis.ravel() for axis in np.meshgrid(*offsets, indexing="ij")], axis=1)
    own, rows, size = state.copy(), np.arange(len(state)), np.full((len(state), 1, 1), 0.5)
    own[:, 1] = np.log(own[:, 1])
    for _ in range(REFINEMENTS):
        tried = own[:, None, :2] + size * steps
        for axis, (least, most) in enumerate(limits):
            tried[..., axis] = np.clip(tried[..., axis], least, most)
        low, high, value = levels(shape(link, tried[..., :1], np.exp(tried[..., 1:]), place), scores, weights, bounds)
        best = np.argmin(value, axis=1)
        new = np.column_stack([tried[rows, best], *(column[rows, best] for column in (low, high, value))])
        better = new[:, 4:] < own[:, 4:]
        own, size = np.where(better, new, own), np.where(better[:, None], size, size / 2)
    own[:, 1] = np.exp(own[:, 1])
    return own


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
        return values @ of.T if of.ndim == 2 else np.asarray(np.einsum("rn,rkn->rk", values, of))

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
