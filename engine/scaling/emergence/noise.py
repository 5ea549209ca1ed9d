"""How scores scatter around a curve: normal, or shares of right answers of m items; whole runs at a time.

Points of a run (its checkpoints, or budgets branched from its trunk) err together: neighbours of a run are correlated,
and draws keep that. Shares of m items scatter at least as binomial numbers do; where runs differ by more, the variance
is that of the binomial times a dispersion above 1 (quasi-likelihood, McCullagh and Nelder 1989, section 4.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.scaling.terms import Array

#: correlation of neighbours is taken as at most this
MOST_CORRELATION = 0.95
#: parameters of a curve: two levels, a place and a span
FREE = 4


@dataclass(frozen=True)
class Scatter:
    """What a measurement of n scores is: their items, and which points are neighbours of a run."""

    runs: NDArray[np.intp]
    """of each point, the number of its run [n]; points are in the order of the axis"""
    items: int | None = None
    """answers that a score is the share of; None: scores scatter normally, all alike"""
    least: float = -np.inf
    most: float = np.inf
    """scores are within"""

    def weights(self, means: Array) -> Array:
        """1 over variance, up to the dispersion, at the means of a curve [R, n]."""
        if self.items is None:
            return np.ones_like(means)
        shrunk = (means * self.items + 0.5) / (self.items + 1.0)
        return self.items / (shrunk * (1.0 - shrunk))

    def dispersion(self, squares: Array) -> Array:
        """Variance times weight, from weighted sums of squares of a fitted curve [R]."""
        found = squares / max(1, len(self.runs) - FREE)
        return found if self.items is None else np.maximum(found, 1.0)

    def correlation(self, residuals: Array) -> float:
        """Of neighbours of a run, from residuals [n] of a curve."""
        first, second = self._neighbours
        spread = float(np.mean(residuals**2))
        if not len(first) or spread <= 0.0:
            return 0.0
        found = float(np.mean(residuals[first] * residuals[second])) / spread
        return float(np.clip(found, 0.0, MOST_CORRELATION))

    @property
    def _neighbours(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        order = np.argsort(self.runs, kind="stable")
        same = self.runs[order][1:] == self.runs[order][:-1]
        return order[:-1][same], order[1:][same]

    def draw(
        self, means: Array, dispersion: Array | float, correlation: float, count: int, random: np.random.Generator
    ) -> Array:
        """New measurements [count, n] around means [n] or [count, n]; a dispersion for all, or for each [count, 1]."""
        means = np.broadcast_to(means, (count, len(self.runs)))
        normal = random.standard_normal(means.shape)
        for before, after in zip(*self._neighbours, strict=True):
            normal[:, after] = correlation * normal[:, before] + np.sqrt(1 - correlation**2) * normal[:, after]
        if self.items is None:
            return np.clip(means + np.sqrt(dispersion) * normal, self.least, self.most)
        means = np.clip(means, 0.0, 1.0)
        # items add 1 - 1 / m of a binomial's variance to what the runs differ by
        extra = (dispersion - 1.0) / max(1, self.items - 1) * means * (1.0 - means)
        latent = np.clip(means + np.sqrt(np.maximum(extra, 0.0)) * normal, 0.0, 1.0)
        return random.binomial(self.items, latent) / self.items
