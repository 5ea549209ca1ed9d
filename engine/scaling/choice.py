"""Which law to believe: the one that predicts larger runs than it was fitted to, not the one that fits best."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import UserError
from engine.scaling.fit import Interval, check_enough, fit
from engine.scaling.optimise import minimise
from engine.scaling.points import Points
from engine.scaling.terms import Array, Law

#: shares of the runs, from the smallest compute on, that laws are fitted to
SHARES = (0.5, 0.65, 0.8)
#: starts of a fit of a part: parts are easier than the whole
PART_STARTS = 64


@dataclass(frozen=True)
class Candidate:
    """A law and how it predicts."""

    law: Law
    error: float
    """root mean square of log(predicted / reached) of held-out runs; infinite where no part can hold all laws"""
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
    held, refused = [], []
    for law in laws:
        try:
            check_enough(law, points)
            held.append(law)
        except UserError as error:
            refused.append(str(error))
    if not held:
        raise UserError(refused[0])
    parts = list(_parts(points, held))
    return sorted((_candidate(points, law, parts) for law in held), key=lambda each: each.error)


def _parts(points: Points, laws: Sequence[Law]) -> Iterator[tuple[Points, Points]]:
    """The runs of least compute and the others, for each share that can hold all of the laws."""
    order = np.argsort(points.flops, kind="stable")
    for share in SHARES:
        count = round(share * len(points))
        small, large = points.take(order[:count]), points.take(order[count:])
        with contextlib.suppress(UserError):
            for law in laws:
                check_enough(law, small)
            yield small, large


def _candidate(points: Points, law: Law, parts: Sequence[tuple[Points, Points]]) -> Candidate:
    errors = [
        np.log(law.predict(_minimum(small, law), large)) - np.log(large.losses) for small, large in parts if len(large)
    ]
    residuals = np.log(points.losses) - np.log(law.predict(_minimum(points, law), points))
    square = float(np.mean(np.concatenate(errors) ** 2)) if errors else np.inf
    return Candidate(law, square**0.5, float(np.sqrt(np.mean(residuals**2))))


def _minimum(points: Points, law: Law) -> Array:
    """The parameters of a fit, neither checked by the second optimiser nor with intervals."""
    found = minimise(law.design(points), np.log(points.losses), law.grid(PART_STARTS))
    return np.asarray(found.theta[found.best])


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
