"""A test of a change at a point against a smooth law, with the place of the change and the power of the test.

T = (Q_smooth - Q_change) / dispersion, where Q are weighted sums of squares of the best smooth sigmoid and of the best
step, kink or sharp sigmoid. All have four parameters or fewer, so neither side wins by being free. T has no table
(places are not identified under the smooth law, Davies 1987): its distribution is that of data drawn from the fitted
smooth law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.scaling.emergence.curves import Bounds, Curves, fit
from engine.scaling.emergence.noise import Scatter
from engine.scaling.emergence.shapes import SMOOTH_SPAN, Family, changes, shape, smooth
from engine.scaling.fit import Interval
from engine.scaling.terms import Array

RESAMPLES = 999
#: places of a planted jump that the power is a mean over
PLANTED = 8
#: a fit is called perfect below this share of the scores' variance, and no dispersion is smaller
PERFECT = 1e-10


@dataclass(frozen=True)
class Measurement:
    """Scores along an axis, in its order."""

    axis: Array
    """[n], growing"""
    scores: Array
    """[n]"""
    scatter: Scatter
    bounds: Bounds
    span: float = SMOOTH_SPAN
    """see `engine.scaling.emergence.shapes`"""

    @property
    def place(self) -> Array:
        """The axis from 0 to 1."""
        return np.asarray((self.axis - self.axis[0]) / (self.axis[-1] - self.axis[0]))

    def on_axis(self, place: Array) -> Array:
        return np.asarray(self.axis[0] + place * (self.axis[-1] - self.axis[0]))


@dataclass(frozen=True)
class Compared:
    """Both sides fitted to R resamples, and how far the change is ahead."""

    smooth: Curves
    changes: Mapping[str, Curves]
    """by form"""
    ahead: Array
    """T of the best form [R]"""
    dispersion: Array
    """[R]"""

    def form(self, points: int, families: Sequence[Family]) -> str:
        """That of the first resample, by the Bayesian information criterion (Schwarz 1978)."""
        cost = {family.name: family.free * np.log(points) for family in families}
        return min(cost, key=lambda name: cost[name] + float(self.changes[name].value[0] / self.dispersion[0]))


@dataclass(frozen=True)
class Change:
    """What a test found; curves and numbers of one measurement."""

    measured: Measurement
    smooth: Curves
    change: Curves
    p: float
    """the probability of a change as far ahead of the smooth law if that were true"""
    p_growth: float
    """the same of the smooth law ahead of a constant"""
    threshold: Interval
    """place of the change on the axis"""
    height: float
    """of the jump whose power is told: the rise of the smooth curve over the range, or what was asked for"""
    power: float
    """the probability that such a jump is found"""

    @property
    def form(self) -> str:
        """step, kink or sigmoid"""
        return str(self.change.family[0])


def fit_smooth(measured: Measurement, scores: Array) -> tuple[Curves, Array, Array]:
    """The smooth law of each resample of the scores [R, n], the weights by its means, and Q of a constant [R]."""
    families, scatter, place = [smooth(measured.span)], measured.scatter, measured.place
    weights = scatter.weights(np.broadcast_to(scores.mean(axis=1, keepdims=True), scores.shape))
    found = fit(families, place, scores, weights, measured.bounds)
    if scatter.items is not None:
        weights = scatter.weights(found.at(place))
        found = fit(families, place, scores, weights, measured.bounds)
    middle = (weights * scores).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    return found, weights, (weights * (scores - middle) ** 2).sum(axis=1)


def growth(measured: Measurement, scores: Array) -> Array:
    """How far the smooth law is ahead of a constant, in units of the dispersion [R]."""
    found, _, constant = fit_smooth(measured, scores)
    return (constant - found.value) / _dispersion(measured, found.value, constant)


def compare(measured: Measurement, scores: Array) -> Compared:
    """Fit both sides to resamples of the scores [R, n]."""
    found, weights, constant = fit_smooth(measured, scores)
    forms = {
        family.name: fit([family], measured.place, scores, weights, measured.bounds)
        for family in changes(measured.place, measured.span)
    }
    best = np.min([curves.value for curves in forms.values()], axis=0)
    dispersion = _dispersion(measured, best, constant)
    return Compared(found, forms, (found.value - best) / dispersion, dispersion)


def _dispersion(measured: Measurement, squares: Array, constant: Array) -> Array:
    return np.maximum(measured.scatter.dispersion(squares), np.maximum(PERFECT * constant, 1e-300))


@dataclass(frozen=True)
class Source:
    """Where new scores come from: as wide and as correlated as the residuals of the best change, runs drawn whole."""

    measured: Measurement
    dispersion: float
    correlation: float
    random: np.random.Generator

    def draw(self, means: Array, count: int) -> Array:
        """Scores [count, n] around the means [n] or [count, n]."""
        return self.measured.scatter.draw(means, self.dispersion, self.correlation, count, self.random)


def source(measured: Measurement, found: Compared, random: np.random.Generator) -> Source:
    """That of the scores, from both sides fitted to them."""
    change = found.changes[_form(measured, found)]
    weights = measured.scatter.weights(found.smooth.at(measured.place))[0]
    residuals = (measured.scores - change.at(measured.place)[0]) * np.sqrt(weights)
    return Source(measured, float(found.dispersion[0]), measured.scatter.correlation(residuals), random)


def p_change(found: Compared, drawn_from: Source, resamples: int) -> float:
    """The share of resamples of the fitted smooth law in which a change is as far ahead."""
    measured = drawn_from.measured
    drawn = drawn_from.draw(found.smooth.at(measured.place)[0], resamples)
    return _share(compare(measured, drawn).ahead, float(found.ahead[0]))


def _form(measured: Measurement, found: Compared) -> str:
    return found.form(len(measured.scores), changes(measured.place, measured.span))


def find_change(
    measured: Measurement,
    *,
    level: float = 0.05,
    interval: float = 0.9,
    height: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Change:
    """Test a change against the smooth law by a parametric bootstrap (Davison and Hinkley 1997, section 4.4).

    Args:
        level: of the test whose power is told.
        interval: level of the threshold's interval.
        height: of the planted jump, in units of the score; None: the rise of the smooth law over the range.
    """
    found = compare(measured, measured.scores[None])
    made = source(measured, found, np.random.default_rng(seed))
    change = found.changes[_form(measured, found)]
    smooth_means, change_means = (curves.at(measured.place)[0] for curves in (found.smooth, change))
    flat = made.draw(np.full(len(smooth_means), measured.scores.mean()), resamples)
    rise = float(np.ptp(smooth_means)) if height is None else height
    direction = 1.0 if change_means[-1] >= change_means[0] else -1.0
    return Change(
        measured,
        found.smooth,
        change,
        p_change(found, made, resamples),
        _share(growth(measured, flat), float(growth(measured, measured.scores[None])[0])),
        _threshold(change, made, resamples, interval),
        rise,
        _power(made, direction * rise, level, resamples),
    )


def _share(drawn: Array, found: float) -> float:
    """The p-value of a bootstrap, which is never 0."""
    return float((1 + (drawn >= found).sum()) / (1 + len(drawn)))


def _threshold(found: Curves, made: Source, resamples: int, level: float) -> Interval:
    """The place of the change; a step is anywhere between its two neighbours."""
    measured, form = made.measured, str(found.family[0])
    place = measured.place
    drawn = made.draw(found.at(place)[0], resamples)
    families = [family for family in changes(place, measured.span) if family.name == form]
    centres = fit(families, place, drawn, measured.scatter.weights(drawn), measured.bounds).centre
    if form == "step":
        places = np.unique(place)
        after = np.searchsorted(places, centres)
        centres = places[after - 1] + made.random.random(len(centres)) * (places[after] - places[after - 1])
    low, high = np.quantile(measured.on_axis(centres), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(measured.on_axis(found.centre)[0]), float(low), float(high))


def _power(made: Source, height: float, level: float, resamples: int) -> float:
    """The share of planted jumps that the test finds, jumps being between any two neighbours from the second on.

    The critical value is that of the smooth laws nearest to the jumps, which the test would draw from.
    """
    measured, scatter = made.measured, made.measured.scatter
    places = np.unique(measured.place)
    gaps = (places[1:-1] + places[2:]) / 2
    gaps = gaps[np.unique(np.linspace(0, len(gaps) - 1, PLANTED).round().astype(int))]
    base = measured.scores.min() if height > 0 else measured.scores.max()
    rises = np.stack([shape("step", gap, 1.0, measured.place) for gap in gaps])
    steps = np.clip(base + height * rises, scatter.least, scatter.most)
    nearest = compare(measured, steps).smooth.at(measured.place)
    each = -(-resamples // len(gaps))
    null, planted = (
        compare(measured, made.draw(np.repeat(means, each, axis=0), each * len(gaps))).ahead
        for means in (nearest, steps)
    )
    return float(np.mean(planted > np.quantile(null, 1 - level)))
