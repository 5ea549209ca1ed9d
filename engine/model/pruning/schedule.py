"""Gradual pruning: how much is kept after each step, and which units; pure functions.

Shape legend: U units of a sub-layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import PruneConfig, require


@dataclass(frozen=True)
class Schedule:
    """When units go, over the steps of a run, counted from 1."""

    first: int
    """steps in which all are kept"""
    last: int
    """step after which what is kept stays"""
    interval: int

    @classmethod
    def of(cls, prune: PruneConfig, steps: int) -> Schedule:
        """That of a run of so many steps."""
        return cls(int(prune.begin * steps), int(prune.end * steps), prune.interval)

    def check(self) -> None:
        """Refuse a run in which all would go at once.

        Raises:
            UserError: names prune.interval and the steps that there are for it.
        """
        changes = (self.last - 1) // self.interval - self.first // self.interval
        remedy = (
            f"units go between steps {self.first} (prune.begin) and {self.last} (prune.end), and no multiple of it "
            "lies there; give a smaller one, or more train.steps"
        )
        require(changes > 0, "prune.interval", self.interval, remedy)

    def share(self, step: int, final: float) -> float | None:
        """The share that is kept after a step (Zhu and Gupta 2017, equation 1); None where the step changes nothing."""
        if step <= self.first or step > self.last or (step < self.last and step % self.interval > 0):
            return None
        left = 1.0 - (step - self.first) / (self.last - self.first)
        return final + (1.0 - final) * left**3


def kept_units(scores: Sequence[Tensor], kept: Sequence[Tensor], share: float, *, even: bool) -> list[Tensor]:
    """Which units of sub-layers of one kind stay: the highest scores of those that there are, at least one of each.

    Args:
        scores: of the units, [U] each.
        kept: those that there are, [U] bool each.
        share: of all units, also of those that went; rounded up.
        even: keep as many in each sub-layer.
    """
    ranked = [torch.where(there, score.double(), -torch.inf) for score, there in zip(scores, kept, strict=True)]
    if even:
        return [_highest(score, math.ceil(share * len(score))) for score in ranked]
    for score in ranked:
        score[score.argmax()] = torch.inf
    sizes = [len(score) for score in ranked]
    return list(_highest(torch.cat(ranked), max(len(ranked), math.ceil(share * sum(sizes)))).split(sizes))


def _highest(scores: Tensor, count: int) -> Tensor:
    """[n] bool, of equal scores the earlier; never one that went."""
    found = torch.zeros(len(scores), dtype=torch.bool)
    found[scores.argsort(descending=True, stable=True)[:count]] = True
    return found & (scores > -torch.inf)
