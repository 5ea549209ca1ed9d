"""What every way of making new examples is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.data.augment.draws import Draws
from engine.data.augment.words import Words


class Method(Protocol):
    """Makes a new example of each given one."""

    def __call__(self, examples: Sequence[Words], draws: Sequence[Draws]) -> list[Words]:
        """New examples; one that couldn't be changed is as it was.

        Args:
            examples: N texts.
            draws: the random numbers of each, [N], so that none depends on the others.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Of all that new examples depend on beside the examples and the draws."""
        ...


def changed(share: float, words: int) -> int:
    """How many of so many words an operation changes: at least one, as in EDA."""
    return max(1, int(share * words))
