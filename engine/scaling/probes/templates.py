"""Minimal pairs of English grammar that are made of templates: a sentence that is right, and one that isn't.

The templates and words are our own. A frame, words without their number, gives one pair in the singular and one in the
plural, between which right and wrong forms are swapped: who prefers one form whatever is before it is right in half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from engine.scaling.probes.lexicon import (
    ACTIONS,
    DEEDS,
    ENDINGS,
    HANDLED,
    MEN,
    PEOPLE,
    PLACES,
    RELATIONS,
    THINGS,
    TIMES,
    WOMEN,
)

T = TypeVar("T")

#: frames are drawn anew while they are there already; each template has thousands
_ATTEMPTS = 100
#: of nouns: (near, far) in the singular and in the plural
_DETERMINERS = (("this", "these"), ("that", "those"))


@dataclass(frozen=True)
class Pair:
    """Two sentences, of which the first is grammatical."""

    good: str
    bad: str


class Drawn:
    """Random choices."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.default_rng(key)

    def one_of(self, values: tuple[T, ...]) -> T:
        """One of some values."""
        return values[int(self._generator.integers(len(values)))]

    def two_of(self, values: tuple[T, ...]) -> tuple[T, T]:
        """Two different ones."""
        first, second = self._generator.permutation(len(values))[:2]
        return values[first], values[second]


def agreement_simple(draw: Drawn) -> list[Pair]:
    """The farmer sings/sing at night."""
    noun, verb, ending = draw.one_of(PEOPLE), draw.one_of(ACTIONS), draw.one_of(ENDINGS)
    return _agreeing(lambda number: f"The {noun[number]}", verb, ending)


def agreement_attractor(draw: Drawn) -> list[Pair]:
    """The farmer near the trees sings/sing at night: a noun of the other number is nearer to the verb."""
    noun, verb, ending = draw.one_of(PEOPLE), draw.one_of(ACTIONS), draw.one_of(ENDINGS)
    place, thing = draw.one_of(PLACES), draw.one_of(THINGS)
    return _agreeing(lambda number: f"The {noun[number]} {place} the {thing[1 - number]}", verb, ending)


def agreement_relative(draw: Drawn) -> list[Pair]:
    """The farmer that the teachers like sings/sing at night: so is the subject of a relative clause."""
    (noun, other), verb, ending = draw.two_of(PEOPLE), draw.one_of(ACTIONS), draw.one_of(ENDINGS)
    relation = draw.one_of(RELATIONS)
    return _agreeing(
        lambda number: f"The {noun[number]} that the {other[1 - number]} {relation[1 - number]}", verb, ending
    )


def _agreeing(subject: Callable[[int], str], verb: tuple[str, str], ending: str) -> list[Pair]:
    """Subjects in the singular (0) and the plural (1) with verbs that agree and verbs that don't."""
    return [Pair(*(f"{subject(number)} {verb[form]} {ending}." for form in (number, 1 - number))) for number in (0, 1)]


def reflexive(draw: Drawn) -> list[Pair]:
    """The queen saw herself/themselves yesterday."""
    people, single = draw.one_of(((MEN, "himself"), (WOMEN, "herself")))
    noun, deed, time = draw.one_of(people), draw.one_of(DEEDS), draw.one_of(TIMES)
    forms = (single, "themselves")
    return [
        Pair(*(f"The {noun[number]} {deed} {forms[form]} {time}." for form in (number, 1 - number)))
        for number in (0, 1)
    ]


def determiner(draw: Drawn) -> list[Pair]:
    """The farmer painted this tree/trees yesterday."""
    noun, (verb, _), time = draw.one_of(draw.one_of(PEOPLE)), draw.one_of(HANDLED), draw.one_of(TIMES)
    forms, thing = draw.one_of(_DETERMINERS), draw.one_of(THINGS)
    return [
        Pair(*(f"The {noun} {verb} {forms[number]} {thing[form]} {time}." for form in (number, 1 - number)))
        for number in (0, 1)
    ]


def polarity(draw: Drawn) -> list[Pair]:
    """No farmer that the teachers like has ever seen the tree; the bad one: The farmer that no teachers like has ...

    "ever" needs a negation whose scope it is in, and one inside of the relative clause is not enough. Both sentences
    have the same words.
    """
    (noun, other), relation = draw.two_of(PEOPLE), draw.one_of(RELATIONS)
    (_, deed), thing = draw.one_of(HANDLED), draw.one_of(draw.one_of(THINGS))
    pairs = []
    for number, auxiliary in enumerate(("has", "have")):
        clause = f"{other[1 - number]} {relation[1 - number]} {auxiliary} ever {deed} the {thing}."
        pairs.append(Pair(f"No {noun[number]} that the {clause}", f"The {noun[number]} that no {clause}"))
    return pairs


#: makers of a frame's two pairs, by the name of the ability
TEMPLATES: Mapping[str, Callable[[Drawn], list[Pair]]] = {
    make.__name__: make
    for make in (agreement_simple, agreement_attractor, agreement_relative, reflexive, determiner, polarity)
}


def pairs_of(name: str, count: int, seed: int) -> list[Pair]:
    """`count` different pairs of a template, one fewer if that is odd; equal arguments give equal pairs."""
    draw, found = Drawn(seed, list(TEMPLATES).index(name)), dict[Pair, None]()
    for _ in range(_ATTEMPTS * count):
        if len(found) >= count // 2 * 2:
            break
        found |= dict.fromkeys(TEMPLATES[name](draw))
    return list(found)
