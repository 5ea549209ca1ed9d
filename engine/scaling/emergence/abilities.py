"""Abilities as they are measured: the columns of points that hold them, checked, along an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from engine.errors import UserError
from engine.scaling.emergence.change import Measurement
from engine.scaling.emergence.curves import Bounds
from engine.scaling.emergence.noise import Scatter
from engine.scaling.emergence.shapes import SMOOTH_SPAN
from engine.scaling.fit import Interval
from engine.scaling.points import Points
from engine.scaling.terms import Array

#: fewer sizes can't tell a change from a curve of four parameters
FEWEST_SIZES = 4


@dataclass(frozen=True)
class Metric:
    """A score of an ability.

    With `items` it is the share of right answers to so many questions, and scatters as a binomial number at least;
    otherwise normally.
    """

    column: str
    items: int | None = None
    least: float = -np.inf
    most: float = np.inf
    """scores, and the levels of curves, are within"""
    chance: float | None = None
    """the level before any growth; None: free within the limits"""


def accuracy(column: str, items: int | None = None, chance: float | None = None) -> Metric:
    """A share of right answers, 0 to 1."""
    return Metric(column, items, 0.0, 1.0, chance)


@dataclass(frozen=True)
class Ability:
    """One ability under a metric that counts right answers and, if there is one, a continuous metric."""

    name: str
    discontinuous: Metric
    continuous: Metric | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (self.discontinuous,) if self.continuous is None else (self.discontinuous, self.continuous)


@dataclass(frozen=True)
class Axis:
    """What abilities are looked at along."""

    name: str
    unit: str
    of: Callable[[Points], Array]
    """points -> the axis [n], growing as models get better"""
    back: Callable[[float], float]
    """a place of the axis in its unit"""
    counts: str
    """field of points with as many distinct values as the axis must have"""

    def in_unit(self, interval: Interval) -> Interval:
        ends = sorted((self.back(interval.low), self.back(interval.high)))
        return Interval(self.back(interval.value), *ends)


def _power_of_ten(value: float) -> float:
    return float(10.0**value)


AXES: Mapping[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("compute", "FLOPs", lambda points: np.log10(points.flops), _power_of_ten, "parameters"),
        Axis("loss", "nats per token", lambda points: -points.losses, lambda value: -value, "parameters"),
        Axis("tokens", "tokens", lambda points: np.log10(points.tokens), _power_of_ten, "tokens"),
    )
}


def axis_named(name: str) -> Axis:
    """
    Raises:
        UserError: no such axis.
    """
    if name not in AXES:
        raise UserError(f"axis: {name!r} is none; give {', '.join(AXES)}")
    return AXES[name]


def measure(points: Points, metric: Metric, axis: Axis, span: float = SMOOTH_SPAN) -> Measurement:
    """Scores of points in the order of an axis.

    Raises:
        UserError: too few sizes; a metric that the points lack, that is empty or constant or outside of its limits.
    """
    _check_metric(metric)
    count = len(np.unique(getattr(points, axis.counts)))
    if count < FEWEST_SIZES:
        raise UserError(
            f"points: {count} distinct value(s) of {axis.counts} can't tell a change from a smooth law; "
            f"give {FEWEST_SIZES} at least"
        )
    place = axis.of(points)
    order = np.argsort(place, kind="stable")
    if len(np.unique(place)) < FEWEST_SIZES:
        raise UserError(f"axis: points are at fewer than {FEWEST_SIZES} places of {axis.name}; give another axis")
    scores = points.numbers(metric.column)
    check_scores(scores, metric, points)
    scatter = Scatter(points.run_of[order], metric.items, metric.least, metric.most)
    limits = (metric.least, metric.most)
    before = limits if metric.chance is None else (metric.chance, metric.chance)
    return Measurement(place[order], scores[order], scatter, Bounds(before, limits), span)


def _check_metric(metric: Metric) -> None:
    if metric.items is not None and (metric.items < 1 or (metric.least, metric.most) != (0.0, 1.0)):
        raise UserError(
            f"ability: {metric.column} with items={metric.items} must be a share from 0 to 1 of 1 item at least; "
            "leave items out otherwise"
        )
    if metric.chance is not None and not metric.least <= metric.chance <= metric.most:
        raise UserError(f"ability: chance {metric.chance:g} of {metric.column} is outside of its limits; correct it")


def check_scores(scores: Array, metric: Metric, points: Points) -> None:
    """Refuse scores [n] that no curve can be fitted to.

    Raises:
        UserError: they are missing, constant or outside of their limits.
    """
    for score, name in zip(scores, points.names, strict=True):
        if not np.isfinite(score):
            raise UserError(f"ability: {metric.column} of {name} is not a number; leave that point out")
        if not metric.least <= score <= metric.most:
            raise UserError(
                f"ability: {metric.column} of {name} is {score:g}, which is not from {metric.least:g} to "
                f"{metric.most:g}; correct it or the metric"
            )
    if np.ptp(scores) == 0.0:
        raise UserError(f"ability: {metric.column} is {scores[0]:g} in all points, so it tells nothing; leave it out")
