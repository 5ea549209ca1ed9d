"""Misspellings: letters swapped, left out, doubled, or struck beside their key (Belinkov and Bisk 2018)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from engine.data.augment.draws import Draws
from engine.data.augment.method import changed
from engine.data.augment.words import Words, like

KINDS = ("swap", "drop", "repeat", "key")
#: shorter words are left alone
SHORTEST = 4
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    """The keys around each key of a QWERTY keyboard, whose rows are moved by about half a key."""
    places = {letter: (row, column) for row, keys in enumerate(_ROWS) for column, letter in enumerate(keys)}
    near = ((0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0))
    at = {place: letter for letter, place in places.items()}
    return {
        letter: "".join(at[row + down, column + right] for down, right in near if (row + down, column + right) in at)
        for letter, (row, column) in places.items()
    }


NEIGHBOURS = _neighbours()


class Characters:
    """One misspelling in each of some words; tags stay, also of entities, for the words do."""

    def __init__(self, share: float) -> None:
        """Args: share of the words that are changed, at least one."""
        self._share = share
        self.fingerprint = hashlib.sha256(repr(("characters", share)).encode()).hexdigest()

    def __call__(self, examples: Sequence[Words], draws: Sequence[Draws]) -> list[Words]:
        """See `Method`."""
        return [self._one(words, own) for words, own in zip(examples, draws, strict=True)]

    def _one(self, words: Words, draws: Draws) -> Words:
        plain, new = words.plain, list(words.words)
        places = [index for index in plain if len(new[index]) >= SHORTEST and new[index].isalpha()]
        for index in draws.some_of(places, changed(self._share, len(plain))):
            new[index] = misspelt(new[index], draws)
        return words.with_words(new)


def misspelt(word: str, draws: Draws) -> str:
    """A word with one mistake behind its first letter."""
    place = 1 + draws.below(len(word) - 1)
    kind = draws.one_of(KINDS)
    before, letter, after = word[:place], word[place], word[place + 1 :]
    if kind == "swap" and place + 1 < len(word) and letter != word[place + 1]:
        return before + word[place + 1] + letter + after[1:]
    if kind == "key" and letter.lower() in NEIGHBOURS:
        return before + like(draws.one_of(NEIGHBOURS[letter.lower()]), letter) + after
    return before + after if kind == "drop" else before + letter + letter + after
