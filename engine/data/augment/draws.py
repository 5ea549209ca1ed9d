"""Random draws of one new example, from a key: the same in every process, in every order, after every resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from engine.data.pretraining.masking import derive_key, random_bits

T = TypeVar("T")

#: first word of keys after the seed, as those of `engine.data.pretraining.masking`
AUGMENT_DOMAIN = 4
#: random numbers that are made at once
_BLOCK = 64


class Draws:
    """An endless sequence of random numbers, see `random_bits`."""

    def __init__(self, key: int, made: list[int]) -> None:
        """Args: made are the first numbers."""
        self._key, self._made, self._taken = key, made, 0

    def uniform(self) -> float:
        """The next number, in [0, 1), a multiple of 2^-53."""
        if self._taken == len(self._made):
            self._made += random_bits(np.uint64(self._key), np.arange(self._taken, self._taken + _BLOCK)).tolist()
        self._taken += 1
        return (self._made[self._taken - 1] >> 11) * 2.0**-53

    def below(self, limit: int) -> int:
        """A whole number of at least 0 below `limit`."""
        return int(self.uniform() * limit)

    def one_of(self, values: Sequence[T]) -> T:
        """One of some values."""
        return values[self.below(len(values))]

    def some_of(self, values: Sequence[T], count: int) -> list[T]:
        """`count` of some values, or all if there are fewer, in random order."""
        pool = list(values)
        for place in range(min(count, len(pool))):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]


def draws_for(seed: int, *words: ArrayLike) -> list[Draws]:
    """The draws of N new examples.

    Args:
        words: whole numbers that tell what is drawn for, such as an epoch and examples, of shapes that broadcast to
            [N].
    """
    keys = np.atleast_1d(derive_key(seed, AUGMENT_DOMAIN, *words))
    made = random_bits(keys[:, None], np.arange(_BLOCK))
    return [Draws(key, own) for key, own in zip(keys.tolist(), made.tolist(), strict=True)]
