"""Profile of a parameter: how well the law does where the parameter is held, all others being the best for it.

A check of bootstrap intervals that doesn't resample. Under a robust loss the rise of the minimum is scaled before it is
compared with a chi-squared (Heritier and Ronchetti 1994): 2 (F - F_min) E[psi'] / E[psi^2].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from engine.errors import UserError
from engine.scaling.fit import Fit, Interval
from engine.scaling.optimise import DELTA, huber, minimise
from engine.scaling.terms import Array

#: values of the parameter, and how many widths of the bootstrap's interval they span
VALUES, SPAN = 41, 2.0


@dataclass(frozen=True)
class Profile:
    """A parameter's profile."""

    name: str
    values: Array
    rises: Array
    """scaled rise of the minimum, chi-squared with one degree of freedom where the value is the true one"""
    interval: Interval
    """infinite at an end where the profile doesn't rise enough"""


def profile(fit: Fit, name: str) -> Profile:
    """The profile of a parameter, named as the law's fields are.

    Raises:
        UserError: the law has no such parameter.
    """
    if name not in fit.law.fields:
        raise UserError(f"parameter: {name!r} is not of {fit.law.name}; it has {', '.join(fit.law.fields)}")
    index = fit.law.fields.index(name)
    spread = np.quantile(fit.samples[:, index], [0.05, 0.95])
    reach = SPAN * max(float(spread[1] - spread[0]), 1e-3 * abs(fit.theta[index]), 1e-6)
    values = fit.theta[index] + reach * np.linspace(-1, 1, VALUES)
    design, target = fit.law.design(fit.points), np.log(fit.points.losses)
    others = [other for other in range(len(fit.law.fields)) if other != index]
    found = minimise(
        design[:, :, others],
        target,
        np.repeat(fit.theta[None, others], VALUES, axis=0),
        offset=values[:, None, None] * design[None, :, :, index],
    )
    rises = 2 * (found.value - min(fit.value, float(found.value.min()))) * _scale(fit)
    return Profile(name, values, rises, _interval(fit, float(fit.theta[index]), values, rises))


def _scale(fit: Fit) -> float:
    """E[psi'] / E[psi^2] of the residuals. Within delta there may be hardly a point, so psi' is of a wider band."""
    residuals = fit.residuals
    _, slope, _ = huber(residuals, DELTA)
    width = max(DELTA, float(np.median(np.abs(residuals))) / 0.6745)
    # the mean slope of psi is 2 delta times the density of residuals at 0
    density = float(np.mean(np.abs(residuals) <= width)) / (2 * width)
    mean_slope = min(1.0, 2 * DELTA * density)
    return mean_slope / float(np.mean(slope**2))


def _interval(fit: Fit, best: float, values: Array, rises: Array) -> Interval:
    bound = float(stats.chi2.ppf(fit.level, 1))
    ends = []
    for side in (-1, 1):
        outward = values[values * side > best * side][::side]
        heights = rises[values * side > best * side][::side]
        beyond = np.flatnonzero(heights > bound)
        if not len(beyond):
            ends.append(side * np.inf)
            continue
        place = int(beyond[0])
        inner, inner_height = (outward[place - 1], heights[place - 1]) if place else (best, 0.0)
        ends.append(float(inner + (outward[place] - inner) * (bound - inner_height) / (heights[place] - inner_height)))
    return Interval(best, *ends)
