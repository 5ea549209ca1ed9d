"""A score predicted in two steps: scale to loss by a law, loss to score by a curve.

So do Gadre et al. 2024 and Bhagia et al. 2024. The loss is that of `Points.losses`: of a text, or of the task's right
answers. Both steps are fitted to the same resamples of runs, so what moves both moves a prediction as it should.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import UserError
from engine.scaling.emergence.abilities import FEWEST_SIZES, Metric, check_scores
from engine.scaling.emergence.curves import Bounds, Curves
from engine.scaling.emergence.curves import fit as fit_curves
from engine.scaling.emergence.shapes import SMOOTH_SPAN, WIDEST, Family, exponential
from engine.scaling.fit import LEVEL, RESAMPLES, Fit, Interval, fit, run_weights
from engine.scaling.points import Points
from engine.scaling.terms import Array, Law, Scale

#: curves of a score over loss: Bhagia et al. 2024, equation 2, and Gadre et al. 2024, equation 5
LINKS: dict[str, Family] = {
    "sigmoid": Family("sigmoid", ("logistic",), np.linspace(0.0, 3.0, 25), np.geomspace(SMOOTH_SPAN, WIDEST, 9), 4),
    "exponential": exponential(),
}
#: parameters of a curve, for the width of its residuals
FREE = 4


@dataclass(frozen=True)
class TwoStep:
    """Both steps with their resamples."""

    law: Fit
    curve: Curves
    """one"""
    curves: Curves
    """of each resample [r]"""
    scores: Array
    """that they were fitted to [n]"""
    metric: Metric

    def predict(self, scale: Scale, seed: int = 0) -> list[Interval]:
        """The score of a new run at each scale; intervals hold the run."""
        loss = self.law.law.predict(self.law.theta, scale)
        mean = self.curve.at(self._place(loss)[None])[0]
        drawn = self.curves.at(self._place(self.law.draws(scale, seed)))
        drawn += np.random.default_rng(seed + 1).choice(self._spread(), size=drawn.shape)
        drawn = np.clip(drawn, self.metric.least, self.metric.most)
        return [self.law.interval(one, samples) for one, samples in zip(mean, drawn.T, strict=True)]

    def _place(self, loss: Array) -> Array:
        return place_of(loss, self.law.points.losses)

    def _spread(self) -> Array:
        """Residuals of the curve, as wide as those of runs that it was not fitted to."""
        residuals = self.scores - self.curve.at(self._place(self.law.points.losses)[None])[0]
        free = max(1, len(residuals) - FREE)
        return np.asarray((residuals - residuals.mean()) * np.sqrt(len(residuals) / free))


def place_of(loss: Array, measured: Array) -> Array:
    """Losses on the measured range, 0 the highest and 1 the lowest."""
    return np.asarray((measured.max() - loss) / np.ptp(measured))


def two_step(
    points: Points,
    metric: Metric,
    law: Law,
    *,
    scores: Array | None = None,
    link: str = "sigmoid",
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> TwoStep:
    """Fit both steps.

    Args:
        points: those to fit to, without what is to be predicted.
        scores: [n] instead of the metric's column: a mean of several.
        link: of score and loss, of `LINKS`.

    Raises:
        UserError: too few points, sizes or losses; scores that are missing, constant or outside of their limits.
    """
    if link not in LINKS:
        raise UserError(f"link: {link!r} is none; give {' or '.join(LINKS)}")
    given = points.numbers(metric.column) if scores is None else scores
    check_scores(given, metric, points)
    if len(np.unique(points.losses)) <= FEWEST_SIZES:
        raise UserError(f"points: {len(points)} with few distinct losses can't hold a curve of loss; give more runs")
    first = fit(points, law, resamples=resamples, level=level, seed=seed)
    weights = run_weights(points, resamples, np.random.default_rng(seed))  # those of the law's resamples
    place, limits = place_of(points.losses, points.losses), (metric.least, metric.most)
    before = limits if metric.chance is None else (metric.chance, metric.chance)

    def curves(of: Array) -> Curves:
        return fit_curves([LINKS[link]], place, np.broadcast_to(given, of.shape), of, Bounds(before, limits))

    return TwoStep(first, curves(np.ones((1, len(points)))), curves(weights), given, metric)
