"""Tokens seen more than once: what D of them is worth to a law, fitted along with it.

Muennighoff et al. 2023, equation 5: of U unique tokens, D tokens in D/U epochs are worth
U + U R (1 - exp(-(D/U - 1) / R)), where R tells how fast repetition loses its worth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar

from engine.errors import UserError
from engine.scaling.fit import check_enough
from engine.scaling.optimise import minimise
from engine.scaling.points import Points
from engine.scaling.terms import Array, Law

#: the range of R that is searched, published: 15.4
LOWEST, HIGHEST = 0.1, 1000.0
GRID = 13


@dataclass(frozen=True)
class Repeated:
    """A law of effective tokens."""

    law: Law
    theta: Array
    worth: float
    """R: the epochs after the first whose tokens are worth 1 - 1/e of as many new ones"""
    value: float
    without: float
    """the minimum where repeated tokens are worth as much as new ones"""


def effective_tokens(tokens: Array, unique: Array, worth: float) -> Array:
    """What tokens are worth of which `unique` are different ones, all [n]."""
    epochs = np.maximum(tokens / unique - 1.0, 0.0)
    return np.where(tokens > unique, unique * (1.0 - worth * np.expm1(-epochs / worth)), tokens)


def fit_repeated(points: Points, unique: Array, law: Law, starts: int = 64) -> Repeated:
    """Fit a law and the worth of repeated tokens.

    Args:
        unique: different tokens of each point's training data [n].

    Raises:
        UserError: unique tokens that aren't positive; no point with more than two epochs; too few points.
    """
    if not (np.isfinite(unique) & (unique > 0)).all():
        raise UserError("unique: a value is not positive; give the number of different tokens of each run's data")
    if (points.tokens <= 2 * unique).all():
        raise UserError("unique: no run saw its data more than twice, so repetition has no effect to fit; leave it out")
    check_enough(law, points)
    target = np.log(points.losses)

    def at(log_worth: float, theta: Array | None = None) -> tuple[float, Array]:
        tokens = effective_tokens(points.tokens, unique, float(np.exp(log_worth)))
        design = law.design(replace(points, tokens=tokens, flops=points.flops))
        found = minimise(design, target, law.grid(starts) if theta is None else theta[None], near=theta is not None)
        return float(found.value[found.best]), found.theta[found.best]

    grid = np.linspace(np.log(LOWEST), np.log(HIGHEST), GRID)
    tried = [at(each) for each in grid]
    best = int(np.argmin([value for value, _ in tried]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)])
    start = tried[best][1]
    found = minimize_scalar(lambda each: at(each, start)[0], bounds=bounds, method="bounded", options={"xatol": 1e-6})
    value, theta = at(float(found.x), start)
    design = law.design(points)
    plain = minimise(design, target, law.grid(starts))
    return Repeated(law, theta, float(np.exp(found.x)), value, float(plain.value[plain.best]))
