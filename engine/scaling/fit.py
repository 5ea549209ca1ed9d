"""A law fitted to points, with bootstrap intervals, and what tells that it can't be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from engine.errors import UserError
from engine.scaling.optimise import DELTA, minimise
from engine.scaling.points import Points
from engine.scaling.projection import project
from engine.scaling.terms import Array, Law, Scale

STARTS = 256
RESAMPLES = 1000
LEVEL = 0.9
#: fewer distinct values of N (or D) can't hold an exponent and a floor
FEWEST, TOO_FEW = 3, 4
#: log D that isn't told by log N, as a standard deviation: with less a law can't tell size from data
LEAST_APART = 0.05
#: resamples of fewer runs are too alike
FEW_RUNS = 5
#: how far the two optimisers may be apart, relative to the minimum
AGREED = 1e-6
#: a law whose residuals depend on scale with a smaller p-value is refused
REFUSED = 0.01
#: a floor below this share of the lowest loss, or with an interval wider than this share of it, isn't identified
LEAST_FLOOR, WIDEST_FLOOR = 0.02, 0.5


@dataclass(frozen=True)
class Interval:
    """A number and where it may be."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Fit:
    """The minimum and what resamples of the runs make of it."""

    law: Law
    points: Points
    theta: Array
    """[fields]"""
    value: float
    """the summed Huber loss"""
    samples: Array
    """parameters of each resample [r, fields]"""
    level: float
    disagreement: float
    """of the second optimiser's minimum from `value`, relative"""

    @cached_property
    def residuals(self) -> Array:
        """log of the loss over that of the law [n]."""
        return np.log(self.points.losses) - np.log(self.law.predict(self.theta, self.points))

    def interval(self, of_theta: Array, of_samples: Array) -> Interval:
        """The percentile interval of a number that parameters give."""
        low, high = np.nanquantile(of_samples, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Interval(float(of_theta), float(low), float(high))

    def parameters(self) -> dict[str, Interval]:
        """Every parameter with its interval; factors instead of their logarithms."""
        return {
            name.removeprefix("log_"): self.interval(
                *(np.exp(part) if name.startswith("log_") else part for part in parts)
            )
            for name, parts in self._columns()
        }

    def _columns(self) -> Iterator[tuple[str, tuple[Array, Array]]]:
        for index, name in enumerate(self.law.fields):
            yield name, (self.theta[index], self.samples[:, index])

    def draws(self, scale: Scale, seed: int = 0) -> Array:
        """The loss of a new run at each scale by each resample [r, n]: a residual is drawn for each."""
        size = (len(self.samples), len(scale.parameters))
        drawn = np.random.default_rng(seed).choice(self._spread(), size=size)
        return np.asarray(self.law.predict(self.samples, scale) * np.exp(drawn))

    def predict(self, scale: Scale, seed: int = 0) -> list[Interval]:
        """The loss of a new run at each scale; intervals hold the run."""
        means, samples = self.law.predict(self.theta, scale), self.draws(scale, seed)
        return [self.interval(mean, sample) for mean, sample in zip(means, samples.T, strict=True)]

    def _spread(self) -> Array:
        """Residuals as wide as those of points that the law was not fitted to."""
        free = max(1, len(self.points) - len(self.law.fields))
        centred = self.residuals - self.residuals.mean()
        return np.asarray(centred * np.sqrt(len(self.points) / free))

    def warnings(self) -> list[str]:
        """Reasons not to trust the fit."""
        return [*self._few(), *self._floor(), *self._shape(), *self._optimisers()]

    def _few(self) -> Iterator[str]:
        for what, values in (("sizes", self.points.parameters), ("token budgets", self.points.tokens)):
            count = len(np.unique(values))
            if count < TOO_FEW and any(name in self.law.fields for name in ("alpha", "beta")):
                yield f"only {count} {what}: too few to tell an exponent from a floor"
        if (runs := len(set(self.points.runs))) < FEW_RUNS:
            yield f"only {runs} independent run(s): resamples of so few are too alike, so all intervals are too narrow"

    def _floor(self) -> Iterator[str]:
        if self.law.floor is None:
            return
        floor, lowest = self.parameters()["E"], float(self.points.losses.min())
        if floor.low < LEAST_FLOOR * lowest or floor.high - floor.low > WIDEST_FLOOR * lowest:
            yield f"E is not identified: {floor}, below losses from {lowest:.4g}: far predictions are open"

    def _shape(self) -> Iterator[str]:
        p = residual_trend(self.residuals, self.points)
        if p < REFUSED:
            yield f"the law is refused: its residuals depend on scale (F-test, p = {p:.2g})"

    def _optimisers(self) -> Iterator[str]:
        if self.disagreement > AGREED:
            yield f"the two optimisers disagree by {self.disagreement:.1g} of the minimum: it may be a local one"


def residual_trend(residuals: Array, points: Points) -> float:
    """The p-value of an F-test for a quadratic surface of log N and log D in the residuals."""
    columns = [np.ones(len(points))]
    axes = [np.log(values) for values in (points.parameters, points.tokens) if len(np.unique(values)) > 2]
    axes = [(axis - axis.mean()) / axis.std() for axis in axes]
    columns += [*axes, *(axis**2 for axis in axes)]
    if len(axes) == 2:
        columns.append(axes[0] * axes[1])
    design = np.stack(columns, axis=1)
    rank = int(np.linalg.matrix_rank(design))
    free = len(points) - rank
    if free < 2 or rank < 2:
        return 1.0
    fitted = design @ np.linalg.lstsq(design, residuals, rcond=None)[0]
    explained, left = ((fitted - residuals.mean()) ** 2).sum(), ((residuals - fitted) ** 2).sum()
    if left <= 0.0:
        return 1.0
    return float(stats.f.sf(explained / (rank - 1) / (left / free), rank - 1, free))


def check_enough(law: Law, points: Points) -> None:
    """Refuse points that can't hold a law.

    Raises:
        UserError: fewer points than parameters, hardly any sizes or budgets, or tokens that follow from the size.
    """
    if len(points) <= len(law.fields):
        raise UserError(f"points: {len(points)} are too few for {law.formula}; give more runs")
    needed = {"parameters": "alpha" in law.fields, "tokens": "beta" in law.fields, "flops": "gamma" in law.fields}
    for name, is_needed in needed.items():
        found = len(np.unique(getattr(points, name)))
        if is_needed and found < FEWEST:
            raise UserError(
                f"points: {found} distinct value(s) of {name} can't hold an exponent; give {FEWEST} at least"
            )
    if needed["parameters"] and "log_B" in law.fields and tokens_apart(points) < LEAST_APART:
        raise UserError(
            f"points: all runs have tokens in one proportion to their size, so {law.formula} can't tell one from the "
            "other; give runs of other tokens per parameter, or the law compute"
        )


def tokens_apart(points: Points) -> float:
    """The standard deviation of log D around its line over log N."""
    sizes, data = (np.log(each) - np.log(each).mean() for each in (points.parameters, points.tokens))
    square = float(sizes @ sizes)
    return float(np.std(data - sizes * (sizes @ data) / square)) if square else float(np.std(data))


def fit(
    points: Points,
    law: Law,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    starts: int = STARTS,
    delta: float = DELTA,
) -> Fit:
    """Fit a law by the Huber loss of log residuals, from many starts; resample runs for intervals.

    Raises:
        UserError: too few points, sizes or budgets.
    """
    check_enough(law, points)
    design, target = law.design(points), np.log(points.losses)
    found = minimise(design, target, law.grid(starts, seed), delta=delta)
    theta, value = found.theta[found.best], float(found.value[found.best])
    other, second = project(law, points, points.losses, delta)
    if second_is_lower := other < value * (1 - AGREED):
        theta = second
    disagreement = abs(other - value) / max(value, 1e-300) if value > 1e-12 or other > 1e-12 else 0.0
    weights = run_weights(points, resamples, np.random.default_rng(seed))
    samples = minimise(design, target, np.repeat(theta[None], resamples, axis=0), weights, delta, near=True).theta
    return Fit(law, points, theta, other if second_is_lower else value, samples, level, disagreement)


def run_weights(points: Points, resamples: int, random: np.random.Generator) -> Array:
    """How often each point is drawn [resamples, n] when runs are drawn with replacement (Efron 1979)."""
    runs = int(points.run_of.max()) + 1
    counts = random.multinomial(runs, np.full(runs, 1 / runs), size=resamples)
    return counts[:, points.run_of].astype(float)
