"""EDA: replacing by synonyms, insertion, swaps and deletion of words (Wei and Zou 2019), and what Dai and Adel (2020,
"An Analysis of Simple Data Augmentation for Named Entity Recognition") make of it for tagged words.

Of tagged words those outside of entities are changed, and swaps stay between two entities. `mention` puts another
entity of the same type in the place of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from engine.data.augment.draws import Draws
from engine.data.augment.english import has_synonyms, is_negation
from engine.data.augment.method import changed
from engine.data.augment.words import Words, like, segments


class Synonyms(Protocol):
    """Synonyms of words in small letters."""

    @property
    def fingerprint(self) -> str:
        """Of all of them."""
        ...

    def __call__(self, lemmas: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Those of each word; perhaps none."""
        ...


#: the words of all entities of a type
Mentions = Mapping[str, Sequence[tuple[str, ...]]]

OPERATIONS = ("replace", "insert", "swap", "delete")
#: further ones of tagged words
TAGGED = ("mention",)
#: those that keep the number of words, and so the tags in their places
KEEPING = ("replace", "swap")


class Eda:
    """One operation, drawn anew for each example among those that can change it."""

    def __init__(
        self,
        share: float,
        synonyms: Synonyms,
        operations: Sequence[str] = OPERATIONS,
        mentions: Mentions | None = None,
    ) -> None:
        """
        Args:
            share: of the words that an operation changes, alpha in the paper; at least one.
            mentions: of the file, for `mention`.
        """
        self._share, self._synonyms = share, synonyms
        self._mentions = mentions or {}
        self._found: dict[str, Sequence[str]] = {}
        self._operations = {name: getattr(self, f"_{name}") for name in operations}
        content = repr(("eda", share, synonyms.fingerprint, tuple(operations)))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def __call__(self, examples: Sequence[Words], draws: Sequence[Draws]) -> list[Words]:
        """See `Method`."""
        self._look_up({words.words[index].lower() for words in examples for index in words.free})
        return [self._one(words, own) for words, own in zip(examples, draws, strict=True)]

    def _look_up(self, words: set[str]) -> None:
        """Remember the synonyms of words; those of grammar have none."""
        new = sorted(word for word in words if word not in self._found)
        sought = [word for word in new if has_synonyms(word)]
        found = self._synonyms(sought) if sought else {}
        self._found |= {word: found.get(word, ()) for word in new}

    def _one(self, words: Words, draws: Draws) -> Words:
        names = list(self._operations)
        for name in draws.some_of(names, len(names)):
            new: Words = self._operations[name](words, draws)
            if new != words:
                return new
        return words

    def _known(self, word: str) -> Sequence[str]:
        """Synonyms of a word."""
        return self._found[word.lower()]

    def _replace(self, words: Words, draws: Draws) -> Words:
        """Synonyms in the place of some words; a word that is there twice is replaced twice."""
        free, new = words.free, list(words.words)
        kinds = list(dict.fromkeys(words.words[index].lower() for index in free if self._known(words.words[index])))
        chosen = {
            kind: draws.one_of(self._known(kind)) for kind in draws.some_of(kinds, changed(self._share, len(free)))
        }
        places = [index for index in free if words.words[index].lower() in chosen]
        for index in places:
            new[index] = like(chosen[words.words[index].lower()], words.words[index])
        words = words.with_words(new)
        for index in places:
            words = _with_article(words, index)
        return words

    def _insert(self, words: Words, draws: Draws) -> Words:
        """Synonyms of some words at random places."""
        sources = [word for word in (words.words[index] for index in words.free) if self._known(word)]
        for _ in range(changed(self._share, len(words.free)) if sources else 0):
            synonym = draws.one_of(self._known(draws.one_of(sources)))
            place = draws.one_of(words.openings)
            words = _with_article(words.with_inserted(place, synonym), place)
        return words

    def _swap(self, words: Words, draws: Draws) -> Words:
        """The places of some pairs of words exchanged, which are between the same entities; a negation stays."""
        moving = [
            [index for index in stretch if not is_negation(words.words[index].lower())] for stretch in segments(words)
        ]
        stretches = [stretch for stretch in moving if len(stretch) > 1]
        pairs = [first for stretch in stretches for first in stretch]
        new = list(words.words)
        for _ in range(changed(self._share, len(words.free)) if pairs else 0):
            first = draws.one_of(pairs)
            stretch = next(each for each in stretches if first in each)
            second = draws.one_of([index for index in stretch if index != first])
            new[first], new[second] = new[second], new[first]
        return words.with_words(new)

    def _delete(self, words: Words, draws: Draws) -> Words:
        """Each word left out with the probability `share`, at least one; a negation and the last word stay."""
        free = [index for index in words.free if not is_negation(words.words[index].lower())]
        if len(words.words) < 2 or not free:
            return words
        gone = [index for index in free if draws.uniform() < self._share] or [draws.one_of(free)]
        for index in reversed(gone if len(gone) < len(words.words) else gone[1:]):
            words = words.without(index)
        return words

    def _mention(self, words: Words, draws: Draws) -> Words:
        """Entities in the places of others of their type, each with the probability 1/2, at least one."""
        found = words.entities
        chosen = [entity for entity in found if draws.uniform() < 0.5] or (found and [draws.one_of(found)])
        for first, stop, kind in reversed(chosen):
            new = draws.one_of(self._mentions[kind])
            words = words.spliced(first, stop, new, [f"B-{kind}", *[f"I-{kind}"] * (len(new) - 1)])
        return words


def _with_article(words: Words, index: int) -> Words:
    """ "a" or "an" before word `index`, by its first letter."""
    article = words.words[index - 1] if index else ""
    if article.lower() not in ("a", "an") or words.gaps[index] != " ":
        return words
    right = "an" if words.words[index][0].lower() in "aeiou" else "a"
    return words.with_words([*words.words[: index - 1], like(right, article), *words.words[index:]])


def mentions_of(texts: Sequence[Words]) -> dict[str, list[tuple[str, ...]]]:
    """The words of all entities of some texts by type, as often as they are there."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for words in texts:
        for first, stop, kind in words.entities:
            found.setdefault(kind, []).append(words.words[first:stop])
    return found
