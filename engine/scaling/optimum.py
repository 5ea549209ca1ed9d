"""What a law says of the best use of compute, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import UserError
from engine.scaling.fit import Fit, Interval
from engine.scaling.points import FLOPS_PER_PARAMETER_TOKEN, Points
from engine.scaling.terms import Array


@dataclass(frozen=True)
class Place:
    """Scales at which a law is read, arrays [n]."""

    parameters: Array
    tokens: Array
    per_parameter_token: float = FLOPS_PER_PARAMETER_TOKEN

    @property
    def flops(self) -> Array:
        return self.per_parameter_token * self.parameters * self.tokens


@dataclass(frozen=True)
class Optimum:
    """The best size and tokens of a compute budget."""

    flops: float
    parameters: Interval
    tokens: Interval
    loss: Interval
    warnings: tuple[str, ...]


def flops_per_parameter_token(points: Points) -> float:
    """The median of C / (N D), which is 6 where only the matrices are counted."""
    return float(np.median(points.flops / (points.parameters * points.tokens)))


def optimum(fit: Fit, flops: float) -> Optimum:
    """N and D that give the lowest loss for C = k N D FLOPs, k that of the points (Hoffmann et al. 2022, equation 4).

    Raises:
        UserError: a law that doesn't tell size from data, or FLOPs that aren't positive.
    """
    if not (np.isfinite(flops) and flops > 0):
        raise UserError(f"flops: {flops!r} is not allowed; give a positive number such as 1e20")
    per = flops_per_parameter_token(fit.points)
    best, drawn = (_best_size(fit, theta, flops / per) for theta in (fit.theta[None], fit.samples))
    tokens, drawn_tokens = flops / per / best, flops / per / drawn
    place = Place(best, tokens, per)
    samples = np.array([
        fit.law.predict(theta, Place(size[None], data[None], per))[0]
        for theta, size, data in zip(fit.samples, drawn, drawn_tokens, strict=True)
    ])  # fmt: skip
    loss = fit.interval(fit.law.predict(fit.theta, place)[0], samples)
    size = fit.interval(best[0], drawn)
    return Optimum(
        flops, size, fit.interval(tokens[0], drawn_tokens), loss, tuple(_outside(fit, size.value, tokens[0]))
    )


def _best_size(fit: Fit, theta: Array, product: float) -> Array:
    """N* of each row of parameters [s, fields] where N D is given."""
    fields = fit.law.fields
    if "log_A" not in fields or "log_B" not in fields:
        raise UserError(f"law: {fit.law.name!r} doesn't tell size from data; give one with both")
    factor, other = theta[:, fields.index("log_A")], theta[:, fields.index("log_B")]
    alpha = theta[:, fields.index("alpha")]
    beta = theta[:, fields.index("beta")] if "beta" in fields else alpha
    with np.errstate(invalid="ignore", divide="ignore"):
        log_ratio = np.log(alpha) + factor - np.log(beta) - other
    return np.asarray(np.exp((log_ratio + beta * np.log(product)) / (alpha + beta)))


def _outside(fit: Fit, size: float, tokens: float) -> list[str]:
    told = []
    for what, value, tried in (("size", size, fit.points.parameters), ("tokens", tokens, fit.points.tokens)):
        if not tried.min() <= value <= tried.max():
            told.append(
                f"the best {what} {value:.3g} is outside of what was trained, {tried.min():.3g} to {tried.max():.3g}"
            )
    return told
