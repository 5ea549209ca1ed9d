"""Made-up studies of scale whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.scaling.points import Points
from engine.scaling.terms import Array

ITEMS = 1000


def ladder(sizes: int = 8, seeds: int = 2) -> Array:
    """Places of a ladder, 0 to 1."""
    return np.repeat(np.linspace(0.0, 1.0, sizes), seeds)


def study(place: Array, columns: Mapping[str, Sequence[float] | Array], runs: Sequence[str] | None = None) -> Points:
    """Points over four decades of compute, with scores."""
    names = tuple(f"run {index}" for index in range(len(place)))
    flops, parameters = 10.0 ** (18 + 4 * place), 10.0 ** (7 + 2 * place)
    texts = {name: tuple(repr(float(value)) for value in values) for name, values in columns.items()}
    whole = names if runs is None else tuple(runs)
    return Points(names, parameters, flops / 6 / parameters, 4.0 - 2.0 * place, flops, whole, texts)


def answered(share: Array, seed: int = 0) -> Array:
    """Shares of right answers to `ITEMS` questions."""
    return np.asarray(np.random.default_rng(seed).binomial(ITEMS, share) / ITEMS)


def noisy(values: Array, noise: float = 0.01, seed: int = 1) -> Array:
    return values + noise * np.random.default_rng(seed).standard_normal(len(values))
