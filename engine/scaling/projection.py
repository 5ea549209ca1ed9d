"""Variable projection: a second way to the same minimum, as a check of the first.

At given exponents L = E + A n + B d is linear in its factors, so the search is over the exponents alone (Golub and
Pereyra 1973): for each, Newton steps find the factors, and the derivative by the exponents is that at fixed factors
(envelope theorem). Unlike `engine.scaling.optimise` it works with the factors and not with their logarithms, from other
starts, by another method.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import minimize, nnls

from engine.scaling.optimise import DELTA, huber
from engine.scaling.terms import Array, Law, Scale

#: exponents of the coarse grid
GRID = (0.05, 0.15, 0.25, 0.35, 0.5, 0.7, 1.0)
INNER_STEPS = 100
#: places of the grid that are searched from
TRIED = 4


class Projection:
    """The objective as a function of a law's exponents."""

    def __init__(self, law: Law, scale: Scale, losses: Array, delta: float = DELTA) -> None:
        self.law, self.delta = law, delta
        self.design, self.losses = law.design(scale), losses
        self.exponents = list(law.exponents)
        self.factors = [index for index in range(len(law.fields)) if index not in law.exponents]

    def columns(self, exponents: Array) -> Array:
        """What each factor multiplies, [n, factors], scaled to a mean of 1; see `scales`."""
        powers = np.exp(self.design[:, :, self.exponents] @ exponents)
        return np.asarray(powers.T)

    def solve(self, exponents: Array, start: Array | None = None) -> tuple[float, Array, Array]:
        """The objective at the best factors, its derivative by the exponents, and log factors."""
        columns = self.columns(exponents)
        scales = columns.mean(axis=0)
        columns = columns / scales
        factors = (
            nnls(columns / self.losses[:, None], np.ones(len(self.losses)))[0] if start is None else start * scales
        )
        factors = self._factors(columns, np.maximum(factors, 1e-12))
        fitted = columns @ factors
        value, pull, _ = huber(np.log(self.losses) - np.log(fitted), self.delta)
        shares = columns * factors / fitted[:, None]
        slopes = np.einsum("nk,knp->np", shares, self.design[:, :, self.exponents])
        return float(value.sum()), -pull @ slopes, factors / scales

    def _factors(self, columns: Array, factors: Array) -> Array:
        """Damped Newton steps to the best positive factors."""
        damping, (value, gradient, curvature) = 1e-6, self._expand(columns, factors)
        for _ in range(INNER_STEPS):
            eigenvalues, vectors = np.linalg.eigh(curvature)
            sizes = np.abs(eigenvalues)
            step = -vectors @ (vectors.T @ gradient / (sizes + (damping + 1e-14) * max(sizes.max(), 1e-300)))
            tried = factors + step
            if (tried > 0).all() and (new := self._expand(columns, tried))[0] < value:
                factors, (value, gradient, curvature) = tried, new
                damping /= 10.0
            else:
                damping = max(damping * 10.0, 1e-8)
            if np.abs(gradient * factors).max() < 1e-14 or damping > 1e12:
                break
        return factors

    def _expand(self, columns: Array, factors: Array) -> tuple[float, Array, Array]:
        fitted = columns @ factors
        value, pull, second = huber(np.log(self.losses) - np.log(fitted), self.delta)
        relative = columns / fitted[:, None]
        curvature = (relative * (second + pull)[:, None]).T @ relative
        return float(value.sum()), -pull @ relative, curvature


def project(law: Law, scale: Scale, losses: Array, delta: float = DELTA) -> tuple[float, Array]:
    """The minimum and its parameters, in the order of the law's fields."""
    problem = Projection(law, scale, losses, delta)
    places = [np.array(place) for place in itertools.product(GRID, repeat=len(problem.exponents))]
    ranked = sorted(places, key=lambda place: problem.solve(place)[0])
    ends = [_descend(problem, place) for place in ranked[:TRIED]]
    value, exponents, factors = min(ends, key=lambda end: end[0])
    theta = np.empty(len(law.fields))
    theta[problem.exponents], theta[problem.factors] = exponents, np.log(factors)
    return value, theta


def _descend(problem: Projection, start: Array) -> tuple[float, Array, Array]:
    found = minimize(lambda place: problem.solve(place)[:2], start, jac=True, method="BFGS", options={"gtol": 1e-12})
    value, _, factors = problem.solve(found.x)
    return value, found.x, factors
