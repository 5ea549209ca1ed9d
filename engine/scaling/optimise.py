"""Huber loss of log residuals, minimised from many starts at once by damped Newton steps.

Hoffmann et al. 2022 minimise the Huber loss (delta 1e-3) of log L by L-BFGS from a grid of starts. Where delta is below
the noise, that loss is close to the absolute error: only few points within delta curve it, and a search that ends at a
small gain ends too early (Besiroglu et al. 2024, on the published fit). Here delta shrinks in stages, each solved by
reweighted least squares, and semismooth Newton steps with the exact Hessian end the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.scaling.terms import Array, log_sum

DELTA = 1e-3
#: deltas of the stages before the last one, in multiples of the final delta
STAGES = (300.0, 100.0, 30.0, 10.0, 3.0)
STAGE_STEPS = 8
FINAL_STEPS = 150
#: bytes of the largest temporary array
CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class Minimum:
    """Where each of s starts ended."""

    theta: Array
    """[s, fields]"""
    value: Array
    """summed Huber loss [s]"""
    gradient: Array
    """largest element of the gradient, by size [s]"""

    @property
    def best(self) -> int:
        return int(np.argmin(self.value))


def huber(residual: Array, delta: float) -> tuple[Array, Array, Array]:
    """Huber's loss of residuals, its derivative, and its second derivative (Huber 1964)."""
    clipped = np.clip(residual, -delta, delta)
    return clipped * (residual - clipped / 2), clipped, (np.abs(residual) <= delta).astype(float)


def minimise(
    design: Array,
    target: Array,
    starts: Array,
    weights: Array | None = None,
    delta: float = DELTA,
    *,
    offset: Array | None = None,
    near: bool = False,
) -> Minimum:
    """Minimise sum_i w_i huber(target_i - log L_i) from each start.

    Args:
        design: [terms, n, fields] of a law.
        target: log losses [n].
        starts: [s, fields].
        weights: of points [n], or of points for each start [s, n]; None: 1.
        offset: what is added to each linear form, [s, terms, n]: the part of parameters that are held.
        near: the starts are near minima, so the stages are left out.
    """
    count, width = starts.shape
    weights = np.ones(len(target)) if weights is None else weights
    each = np.broadcast_to(weights, (count, len(target)))
    size = max(1, CHUNK_BYTES // (8 * design.shape[0] * len(target) * width))
    held = np.zeros((count, design.shape[0], len(target))) if offset is None else offset
    parts = [(starts[:0], np.zeros(0), np.zeros(0))]
    for first in range(0, count, size):
        part = slice(first, first + size)
        objective = Objective(design, target, each[part], held[part])
        parts.append(_minimise(objective, starts[part], delta, near))
    return Minimum(*(np.concatenate(each) for each in zip(*parts, strict=True)))


class Objective:
    """The summed loss of each start, and its derivatives."""

    def __init__(self, design: Array, target: Array, weights: Array, offset: Array) -> None:
        self.design, self.target, self.weights, self.offset = design, target, weights, offset
        self.products = np.einsum("knp,knq->knpq", design, design).reshape(-1, design.shape[2] ** 2)

    def expand(self, theta: Array, which: NDArray[np.intp], delta: float, exact: bool) -> tuple[Array, Array, Array]:
        """Objective [s], gradient [s, p] and Hessian [s, p, p] of the starts `which`; not exact: the Hessian of
        reweighted least squares instead."""
        weights = self.weights[which]
        log_loss, shares = log_sum(self.design, theta, self.offset[which])
        residual = self.target - log_loss
        loss, slope, second = huber(residual, delta)
        slopes = np.einsum("skn,knp->snp", shares, self.design, optimize=True)
        pull = weights * slope
        value, gradient = (weights * loss).sum(axis=1), -np.einsum("sn,snp->sp", pull, slopes, optimize=True)
        if not exact:
            ratio = np.divide(slope, residual, out=np.ones_like(slope), where=residual != 0.0)
            return value, gradient, _gram(slopes, weights * ratio)
        curvature = _gram(slopes, weights * second + pull)
        flat = (shares * pull[:, None]).reshape(len(theta), -1) @ self.products
        return value, gradient, curvature - flat.reshape(curvature.shape)


def _minimise(objective: Objective, theta: Array, delta: float, near: bool) -> tuple[Array, Array, Array]:
    for factor in () if near else STAGES:
        theta, *_ = _descend(objective, theta, factor * delta, STAGE_STEPS, exact=False)
    return _descend(objective, theta, delta, FINAL_STEPS, exact=True)


def _descend(
    objective: Objective, theta: Array, delta: float, steps: int, *, exact: bool
) -> tuple[Array, Array, Array]:
    """Damped steps that never raise the objective; the place, the objective, and the gradient's largest element."""
    theta = theta.copy()
    damping = np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    value, gradient, curvature = objective.expand(theta, active, delta, exact)
    for _ in range(steps):
        tried = theta[active] + _step(gradient[active], curvature[active], damping[active])
        new, new_gradient, new_curvature = objective.expand(tried, active, delta, exact)
        better = new < value[active]
        kept = active[better]
        gain = value[kept] - new[better]
        theta[kept], value[kept] = tried[better], new[better]
        gradient[kept], curvature[kept] = new_gradient[better], new_curvature[better]
        damping[kept] /= 5.0
        damping[active[~better]] *= 8.0
        done = np.zeros(len(active), bool)
        done[better] = gain <= 1e-15 * np.maximum(value[kept], 1e-300)
        done[~better] = damping[active[~better]] > 1e12
        done |= np.abs(gradient[active]).max(axis=1) < 1e-13
        active = active[~done]
        if not len(active):
            break
    return theta, value, np.abs(gradient).max(axis=1)


def _step(gradient: Array, curvature: Array, damping: Array) -> Array:
    """-(|H| + damping * largest eigenvalue)^-1 g: downhill whatever the signs of H's eigenvalues."""
    eigenvalues, vectors = np.linalg.eigh(curvature)
    sizes = np.abs(eigenvalues)
    top = np.maximum(sizes.max(axis=1, keepdims=True), 1e-300)
    along = np.einsum("spq,sp->sq", vectors, gradient)
    step: Array = -np.einsum("spq,sq->sp", vectors, along / (sizes + damping[:, None] * top + 1e-14 * top))
    return step


def _gram(slopes: Array, factors: Array) -> Array:
    """sum_n f_n g_n g_n^T for each start."""
    result: Array = (slopes * factors[..., None]).transpose(0, 2, 1) @ slopes
    return result
