"""IsoFLOP parabolas: at a fixed compute, log loss is close to a parabola in log N.

Hoffmann et al. 2022, section 3.2: the best sizes of several budgets then follow N ~ C^a. No law is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.scaling.fit import LEVEL, RESAMPLES, Interval, run_weights
from engine.scaling.points import Points
from engine.scaling.terms import Array

#: budgets whose FLOPs differ by less than this factor are one
SAME = 1.15
#: sizes that a parabola needs, and budgets that an exponent needs
FEWEST_SIZES, FEWEST_BUDGETS = 4, 2


@dataclass(frozen=True)
class Parabola:
    """A compute budget."""

    flops: float
    points: NDArray[np.intp]
    """indices of its points"""
    best: Interval
    """the size of the lowest loss"""
    inside: bool
    """whether that is between the sizes that were trained"""


@dataclass(frozen=True)
class IsoFlop:
    """All budgets, and how the best size grows with them."""

    budgets: tuple[Parabola, ...]
    exponent: Interval
    """a of N ~ C^a, over budgets whose best size is inside; NaN of fewer than two"""


def isoflop(points: Points, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> IsoFlop:
    """Fit a parabola to each budget that has sizes enough; resample runs for intervals.

    Raises:
        UserError: no budget has.
    """
    groups = [group for group in _budgets(points.flops) if len(np.unique(points.parameters[group])) >= FEWEST_SIZES]
    if not groups:
        raise UserError(
            f"points: no compute budget has {FEWEST_SIZES} sizes within a factor {SAME} of FLOPs; train such"
        )
    sizes, losses = np.log(points.parameters), np.log(points.losses)
    weights = np.concatenate([np.ones((1, len(points))), run_weights(points, resamples, np.random.default_rng(seed))])
    lowest = np.stack([_lowest(sizes[group], losses[group], weights[:, group]) for group in groups], axis=1)
    flops = np.array([float(np.exp(np.log(points.flops[group]).mean())) for group in groups])
    tails = [(1 - level) / 2, (1 + level) / 2]
    budgets = []
    for group, compute, column in zip(groups, flops, lowest.T, strict=True):
        ends = np.exp(np.nanquantile(column[1:], tails)) if np.isfinite(column[1:]).any() else (np.nan, np.nan)
        inside = bool(sizes[group].min() <= column[0] <= sizes[group].max())
        budgets.append(Parabola(float(compute), group, Interval(float(np.exp(column[0])), *map(float, ends)), inside))
    kept = np.array([each.inside for each in budgets])
    return IsoFlop(tuple(budgets), _exponent(np.log(flops[kept]), lowest[:, kept], tails))


def _budgets(flops: Array) -> list[NDArray[np.intp]]:
    """Indices of points with the same FLOPs, from the smallest budget on."""
    order = np.argsort(flops, kind="stable")
    breaks = np.flatnonzero(np.diff(np.log(flops[order])) > np.log(SAME)) + 1
    return list(np.split(order, breaks))


def _lowest(sizes: Array, losses: Array, weights: Array) -> Array:
    """log N of the lowest point for each row of weights [r, n]; NaN where the parabola has none."""
    centre = sizes.mean()
    design = np.stack([np.ones_like(sizes), sizes - centre, (sizes - centre) ** 2], axis=1)
    found = np.full(len(weights), np.nan)
    for row, weight in enumerate(weights):
        root = np.sqrt(weight)[:, None]
        if np.linalg.matrix_rank(design * root) == 3:
            _, slope, bend = np.linalg.lstsq(design * root, losses * root[:, 0], rcond=None)[0]
            found[row] = centre - slope / (2 * bend) if bend > 0 else np.nan
    return found


def _exponent(flops: Array, lowest: Array, tails: list[float]) -> Interval:
    if len(flops) < FEWEST_BUDGETS:
        return Interval(np.nan, np.nan, np.nan)
    centred = flops - flops.mean()
    slopes = lowest @ centred / (centred @ centred)
    low, high = np.nanquantile(slopes[1:], tails)
    return Interval(float(slopes[0]), float(low), float(high))
