"""Points of a known law."""

from __future__ import annotations

import numpy as np

from engine.scaling.optimum import Place
from engine.scaling.points import Points
from engine.scaling.terms import LAWS, Array

#: Hoffmann et al. 2022, equation 10
TRUTH = np.array([np.log(1.69), np.log(406.4), np.log(410.7), 0.34, 0.28])


def points(sizes: int = 8, budgets: int = 6, noise: float = 0.005, seed: int = 0, law: str = "size_and_data") -> Points:
    """A grid of N and D with losses of a law around TRUTH."""
    parameters = np.repeat(np.geomspace(5e7, 1.6e10, sizes), budgets)
    return at(parameters, np.tile(np.geomspace(2, 400, budgets), sizes) * parameters, noise, seed, law)


def at(parameters: Array, tokens: Array, noise: float = 0.005, seed: int = 0, law: str = "size_and_data") -> Points:
    """Points at these N and D."""
    place = Place(parameters, tokens)
    drawn = np.random.default_rng(seed).standard_normal(len(parameters))
    losses = LAWS[law].predict(truth(law), place) * np.exp(noise * drawn)
    names = tuple(f"run {index}" for index in range(len(parameters)))
    return Points(names, parameters, tokens, losses, place.flops, names, {})


def truth(law: str) -> Array:
    """The parameters of a law."""
    values = dict(zip(LAWS["size_and_data"].fields, TRUTH, strict=True)) | {"gamma": 0.15}
    return np.array([values[name] for name in LAWS[law].fields])
