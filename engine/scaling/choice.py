"""Which law to believe: the one that predicts larger runs than it was fitted to, not the one that fits best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import UserError
from engine.scaling.fit import Interval, check_enough, fit
from engine.scaling.points import Points
from engine.scaling.terms import Law

#: shares of the runs, from the smallest compute on, that laws are fitted to
SHARES = (0.5, 0.65, 0.8)
#: starts of a fit of a part: parts are easier than the whole
PART_STARTS = 64


@dataclass(frozen=True)
class Candidate:
    """A law and how it predicts."""

    law: Law
    error: float
    """root mean square of log(predicted / reached) of held-out runs"""
    residual: float
    """the same of the runs that it was fitted to, all of them"""


@dataclass(frozen=True)
class HeldOut:
    """A run that the law was not fitted to."""

    name: str
    predicted: Interval
    reached: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted.value / self.reached - 1.0

    @property
    def covered(self) -> bool:
        return self.predicted.holds(self.reached)


def rank(points: Points, laws: Sequence[Law]) -> list[Candidate]:
    """The laws that the points can hold, from the best predictor on.

    Raises:
        UserError: they can't hold any.
    """
    order = np.argsort(points.flops, kind="stable")
    found, refused = [], []
    for law in laws:
        try:
            check_enough(law, points)
            found.append(_candidate(points, law, order))
        except UserError as error:
            refused.append(str(error))
    if not found:
        raise UserError(refused[0])
    return sorted(found, key=lambda each: each.error)


def _candidate(points: Points, law: Law, order: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Candidate:
    errors = []
    for share in SHARES:
        count = max(len(law.fields) + 1, round(share * len(points)))
        small, large = points.take(order[:count]), points.take(order[count:])
        if len(large):
            part = fit(small, law, resamples=0, starts=PART_STARTS)
            errors.append(np.log(law.predict(part.theta, large)) - np.log(large.losses))
    whole = fit(points, law, resamples=0, starts=PART_STARTS)
    square = float(np.mean(np.concatenate(errors) ** 2)) if errors else np.inf
    return Candidate(law, square**0.5, float(np.sqrt(np.mean(whole.residuals**2))))


def predict_largest(points: Points, law: Law, sizes: int = 1, resamples: int = 1000, seed: int = 0) -> list[HeldOut]:
    """Fit a law to all but the largest sizes, and predict those.

    Raises:
        UserError: too few sizes are left.
    """
    kept = np.unique(points.parameters)[:-sizes]
    small = np.isin(points.parameters, kept)
    found = fit(points.take(small), law, resamples=resamples, seed=seed)
    large = points.take(~small)
    return [
        HeldOut(name, interval, float(loss))
        for name, interval, loss in zip(large.names, found.predict(large), large.losses, strict=True)
    ]
