"""Laws as sums of positive terms, each the exponential of a linear form of the parameters.

L = sum_k exp(X_k theta), so log L = logsumexp_k(X_k theta): with the floor exp(e), exp(a) / N^alpha and exp(b) / D^beta
that is Hoffmann et al. 2022, appendix D.2. One optimiser with exact first and second derivatives does for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Scale(Protocol):
    """What a law reads of points, arrays [n] of positive numbers."""

    @property
    def parameters(self) -> Array: ...

    @property
    def tokens(self) -> Array: ...

    @property
    def flops(self) -> Array: ...


@dataclass(frozen=True)
class Law:
    """A form of the loss."""

    name: str
    formula: str
    fields: tuple[str, ...]
    """of the parameters, in their order; those named in `logs` are logarithms of a factor"""
    design: Callable[[Scale], Array]
    """points -> [terms, n, fields]"""
    starts: Mapping[str, tuple[float, ...]]
    """values of each parameter that optimisers start from"""

    @property
    def exponents(self) -> tuple[int, ...]:
        """Indices of the parameters that are exponents."""
        return tuple(index for index, name in enumerate(self.fields) if name in EXPONENTS)

    @property
    def floor(self) -> int | None:
        """The index of the irreducible loss's logarithm; None where the law has none."""
        return self.fields.index("log_E") if "log_E" in self.fields else None

    def grid(self, most: int, seed: int = 0) -> Array:
        """Starts [at most `most`, fields]: all combinations, or so many of them drawn evenly."""
        axes = [self.starts[name] for name in self.fields]
        every = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        if len(every) <= most:
            return every
        return every[np.sort(np.random.default_rng(seed).choice(len(every), most, replace=False))]

    def predict(self, theta: Array, scale: Scale) -> Array:
        """Losses [..., n] by parameters [..., fields]."""
        return np.exp(log_sum(self.design(scale), np.atleast_2d(theta))[0]).reshape(*theta.shape[:-1], -1)

    def named(self, theta: Array) -> dict[str, float]:
        """Parameters as they are published: factors instead of their logarithms."""
        return {
            name.removeprefix("log_"): float(np.exp(value)) if name.startswith("log_") else float(value)
            for name, value in zip(self.fields, theta, strict=True)
        }


EXPONENTS = ("alpha", "beta", "gamma")


def log_sum(design: Array, theta: Array, offset: Array | float = 0.0) -> tuple[Array, Array]:
    """log L [s, n] and the share of each term in L [s, terms, n] of parameters [s, fields].

    Args:
        offset: added to the linear forms [s, terms, n].
    """
    forms = np.einsum("knp,sp->skn", design, theta, optimize=True) + offset
    top = forms.max(axis=1, keepdims=True)
    powers = np.exp(forms - top)
    total = powers.sum(axis=1, keepdims=True)
    return (top + np.log(total))[:, 0], powers / total


def _columns(scale: Scale, *terms: tuple[tuple[int, Array | float], ...], width: int) -> Array:
    """A design whose terms have the given (field, values)."""
    count = len(scale.parameters)
    design = np.zeros((len(terms), count, width))
    for number, term in enumerate(terms):
        for index, values in term:
            design[number, :, index] = values
    return design


def _size_and_data(scale: Scale) -> Array:
    sizes, data = np.log(scale.parameters), np.log(scale.tokens)
    return _columns(scale, ((0, 1.0),), ((1, 1.0), (3, -sizes)), ((2, 1.0), (4, -data)), width=5)


def _equal_exponents(scale: Scale) -> Array:
    sizes, data = np.log(scale.parameters), np.log(scale.tokens)
    return _columns(scale, ((0, 1.0),), ((1, 1.0), (3, -sizes)), ((2, 1.0), (3, -data)), width=4)


def _without_floor(scale: Scale) -> Array:
    sizes, data = np.log(scale.parameters), np.log(scale.tokens)
    return _columns(scale, ((0, 1.0), (2, -sizes)), ((1, 1.0), (3, -data)), width=4)


def _compute(scale: Scale) -> Array:
    return _columns(scale, ((0, 1.0),), ((1, 1.0), (2, -np.log(scale.flops))), width=3)


def _compute_without_floor(scale: Scale) -> Array:
    return _columns(scale, ((0, 1.0), (1, -np.log(scale.flops))), width=2)


_FLOORS = (-1.0, 0.0, 0.5, 1.0)
_FACTORS = (0.0, 4.0, 8.0, 12.0, 16.0)
_RATES = (0.05, 0.2, 0.35, 0.5, 0.8)

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law(
            "size_and_data", "E + A/N^alpha + B/D^beta", ("log_E", "log_A", "log_B", "alpha", "beta"), _size_and_data,
            {"log_E": _FLOORS, "log_A": _FACTORS, "log_B": _FACTORS, "alpha": _RATES, "beta": _RATES},
        ),
        Law(
            "equal_exponents", "E + A/N^alpha + B/D^alpha", ("log_E", "log_A", "log_B", "alpha"), _equal_exponents,
            {"log_E": _FLOORS, "log_A": _FACTORS, "log_B": _FACTORS, "alpha": _RATES},
        ),
        Law(
            "no_floor", "A/N^alpha + B/D^beta", ("log_A", "log_B", "alpha", "beta"), _without_floor,
            {"log_A": _FACTORS, "log_B": _FACTORS, "alpha": _RATES, "beta": _RATES},
        ),
        Law(
            "compute", "E + A/C^gamma", ("log_E", "log_A", "gamma"), _compute,
            {"log_E": _FLOORS, "log_A": _FACTORS, "gamma": _RATES},
        ),
        Law(
            "compute_no_floor", "A/C^gamma", ("log_A", "gamma"), _compute_without_floor,
            {"log_A": _FACTORS, "gamma": _RATES},
        ),
    )
}  # fmt: skip
