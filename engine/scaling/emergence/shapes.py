"""Shapes of a rise from one level to another, over an axis whose measured range is 0 to 1.

A curve is f (1 - s) + c s, with levels f and c and a shape s of a place and a span. Sigmoids have three links, so that
a rise may be steeper at its start or at its end. In their tails they are exponential in log compute, so a power law of
compute with a floor or a ceiling is a limit of them. What makes a sigmoid smooth or sharp is its span: the part of the
range in which it goes from 10 % to 90 % of its rise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from engine.scaling.terms import Array

#: spans from here on are smooth: the middle 80 % of the rise takes at least half of the measured range
SMOOTH_SPAN = 0.5
#: the largest span, a straight line for all that points can tell, and the smallest, a step
WIDEST, SHARPEST = 8.0, 0.02
#: how far outside of the range a smooth rise may have its middle; from there on, only an exponential tail is seen
OUTSIDE = 0.8
#: the last place of a kink: after it there is hardly any range for the growth
LAST_KINK = 0.95
MOST_EXPONENT = 500.0


def _logistic(distance: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(np.clip(-2 * np.log(9.0) * distance, -MOST_EXPONENT, MOST_EXPONENT))))


def _gompertz(distance: Array) -> Array:
    """exp(-exp(-t)), 1/2 at distance 0: of many answers that must all be right, each wrong with a chance like e^-t."""
    at_half, width = -np.log(np.log(2.0)), np.log(np.log(10.0)) - np.log(np.log(10.0 / 9.0))
    return np.asarray(np.exp(-np.exp(np.clip(-(width * distance + at_half), -MOST_EXPONENT, 6.5))))


def _mirrored(distance: Array) -> Array:
    return 1.0 - _gompertz(-distance)


def _exponential(distance: Array) -> Array:
    return np.asarray(np.exp(np.clip(distance, -MOST_EXPONENT, MOST_EXPONENT)))


SIGMOIDS: Mapping[str, Callable[[Array], Array]] = {
    "logistic": _logistic,
    "gompertz": _gompertz,
    "mirrored": _mirrored,
}


def shape(link: str, centre: Array | float, span: Array | float, place: Array) -> Array:
    """s at places; the arguments broadcast."""
    if link == "step":
        return (place > centre).astype(float)
    if link == "kink":
        return np.asarray(np.maximum(place - centre, 0.0) / (1.0 - np.asarray(centre)))
    if link == "exponential":
        return _exponential((place - centre) / span)
    return SIGMOIDS[link]((place - centre) / span)


@dataclass(frozen=True)
class Family:
    """Shapes that are searched: a grid of centres and spans for each link, finer around its best."""

    name: str
    links: tuple[str, ...]
    centres: Array
    spans: Array
    """growing in equal factors; one where the links have no span"""
    free: int
    """parameters: the two levels, and of place and span those that are searched"""
    refined: bool = True
    """False: the grid has all shapes that differ"""

    def limits(self, link: str) -> tuple[float, float]:
        """Of the centre. The steep side of a lopsided sigmoid grows faster the farther it is from the middle, whatever
        the span, so its middle isn't farther away than the end of the range."""
        least, most = float(self.centres.min()), float(self.centres.max())
        return max(least, 0.0) if link == "mirrored" else least, min(most, 1.0) if link == "gompertz" else most

    def grid(self, link: str) -> tuple[Array, Array]:
        """Centre and span of every shape of a link, [K] each."""
        least, most = self.limits(link)
        centres = self.centres[(self.centres >= least) & (self.centres <= most)]
        centre, span = np.meshgrid(centres, self.spans, indexing="ij")
        return centre.ravel(), span.ravel()


def smooth(span: float = SMOOTH_SPAN) -> Family:
    """Sigmoids as wide as `span` at least, with their exponential tails."""
    centres = np.linspace(-OUTSIDE, 1 + OUTSIDE, 27)
    return Family("smooth", tuple(SIGMOIDS), centres, np.geomspace(span, WIDEST, 7), free=4)


def changes(place: Array, span: float = SMOOTH_SPAN) -> tuple[Family, ...]:
    """What a change can look like: a step, a kink, a sharp sigmoid. Two places at least are before it.

    Args:
        place: of the points [n], 0 to 1.
        span: that of the smooth ones.
    """
    places = np.unique(place)
    first = float(places[1])
    none = np.ones(1)
    return (
        Family("step", ("step",), (places[1:-1] + places[2:]) / 2, none, 3, refined=False),
        Family("kink", ("kink",), np.linspace(first, LAST_KINK, 25), none, 3),
        Family("sigmoid", tuple(SIGMOIDS), np.linspace(first, 1.0, 17), np.geomspace(SHARPEST, 0.98 * span, 5), 4),
    )


def exponential() -> Family:
    """f + (c - f) exp((x - 1) / span): Gadre et al. 2024, equation 5, of -loss."""
    return Family("exponential", ("exponential",), np.ones(1), np.geomspace(0.05, WIDEST, 24), 3)
