"""How many units each sub-layer keeps, so that the least is lost within a budget.

Losses and costs add up over sub-layers, so for a price of a cost each sub-layer chooses alone what is cheapest, and the
right price is found by bisection (Lagrange multipliers; Shoham and Gersho 1988). Where a unit costs the same wherever
it is, as with FLOPs, that is the optimum of Kwon et al. 2022 (algorithm 1); but costs may be any table, such as
measured times. What the price leaves of the budget is spent step by step on what loses least for its cost.

Shape legend: K sizes that a sub-layer may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
#: halvings of the range of prices
ROUNDS = 200


@dataclass(frozen=True)
class Choice:
    """The sizes that a sub-layer, or several alike, may have, ascending."""

    sizes: tuple[int, ...]
    """units that are kept, [K]"""
    losses: Numbers
    """[K], descending"""
    costs: Numbers
    """[K]"""

    def at(self, price: float) -> int:
        """Which of the sizes has the least loss and paid cost; of equal ones the cheapest."""
        paid = self.losses + price * self.costs
        return int(paid.argmin())


def choice(importances: Sequence[Numbers], costs: Numbers, sizes: Sequence[int]) -> Choice:
    """That of sub-layers which all keep as many units, the most important ones.

    Args:
        importances: of the units of each.
        costs: of one of them by size, [K].
        sizes: [K], ascending.
    """
    lost = sum(np.concatenate(([0.0], np.sort(each).cumsum()))[len(each) - np.array(sizes)] for each in importances)
    return Choice(tuple(sizes), np.asarray(lost), np.maximum.accumulate(len(importances) * costs))


def search(choices: Sequence[Choice], budget: float) -> list[int] | None:
    """The size of each choice, whose costs add up to at most the budget; None where no sizes do."""
    if sum(each.costs[0] for each in choices) > budget:
        return None

    def total(places: Sequence[int]) -> float:
        return float(sum(each.costs[place] for each, place in zip(choices, places, strict=True)))

    places = [len(each.sizes) - 1 for each in choices]
    if total(places) > budget:
        low, high = 1e-30, 1e30
        places = [0] * len(choices)
        for _ in range(ROUNDS):
            price = float(np.sqrt(low * high))
            now = [each.at(price) for each in choices]
            if total(now) > budget:
                low = price
            else:
                high, places = price, now
    _spend(choices, places, budget - total(places))
    return [each.sizes[place] for each, place in zip(choices, places, strict=True)]


def _spend(choices: Sequence[Choice], places: list[int], left: float) -> None:
    """Raise sizes, in place, as far as what is left of the budget allows."""
    while True:
        best, gain = None, 0.0
        for index, (each, place) in enumerate(zip(choices, places, strict=True)):
            if place + 1 == len(each.sizes):
                continue
            cost = each.costs[place + 1] - each.costs[place]
            won = (each.losses[place] - each.losses[place + 1]) / max(cost, 1e-300)
            if cost <= left and (best is None or won > gain):
                best, gain = index, won
        if best is None:
            return
        left -= choices[best].costs[places[best] + 1] - choices[best].costs[places[best]]
        places[best] += 1
