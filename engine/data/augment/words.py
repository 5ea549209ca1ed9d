"""A text as words and what stands between them, so that a word changes and all else stays as it is written.

Shapes: W words of a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from engine.data.labelled.tagged.schemes import OUTSIDE

#: letters and digits, with apostrophes and hyphens inside; the 's of "it 's" and the lrb of "-lrb-" are no words
_WORD = re.compile(r"(?<![\w'’-])[^\W_]+(?:['’-][^\W_]+)*(?![\w-])")
_CONTINUES = "I-"


@dataclass(frozen=True)
class Words:
    """A text; nothing changes one, every operation makes another."""

    words: tuple[str, ...]
    gaps: tuple[str, ...]
    """what stands before each word and behind the last, [W + 1]"""
    tags: tuple[str, ...]
    """of the words in BIO, [W]; of a text without tags all are O"""

    @property
    def text(self) -> str:
        """The text."""
        parts = [part for pair in zip(self.gaps, self.words, strict=False) for part in pair]
        return "".join(parts) + self.gaps[-1]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where in the text each word starts and stops."""
        found, place = [], 0
        for gap, word in zip(self.gaps, self.words, strict=False):
            place += len(gap)
            found.append((place, place + len(word)))
            place += len(word)
        return found

    @cached_property
    def entities(self) -> list[tuple[int, int, str]]:
        """First word, the word behind the last, and type of each entity."""
        begins = [index for index, tag in enumerate(self.tags) if tag.startswith("B-")]
        found = []
        for first in begins:
            stop = first + 1
            while stop < len(self.tags) and self.tags[stop].startswith(_CONTINUES):
                stop += 1
            found.append((first, stop, self.tags[first][2:]))
        return found

    @cached_property
    def free(self) -> list[int]:
        """The words outside of entities that are words and no marks, addresses or the like."""
        return [index for index in self.plain if self.tags[index] == OUTSIDE]

    @cached_property
    def plain(self) -> list[int]:
        """The words that are no marks, addresses or the like."""
        return [index for index, word in enumerate(self.words) if _WORD.fullmatch(word)]

    @property
    def openings(self) -> list[int]:
        """The places where a word can be put: before these words, or (W) behind the last; inside of no entity."""
        count = len(self.words)
        return [index for index in range(count + 1) if index in (0, count) or self._is_apart(index)]

    def _is_apart(self, index: int) -> bool:
        return self.gaps[index].endswith(" ") and not self.tags[index].startswith(_CONTINUES)

    def with_words(self, words: Sequence[str]) -> Words:
        """Other words in the places of these."""
        return replace(self, words=tuple(words))

    def spliced(self, first: int, stop: int, words: Sequence[str], tags: Sequence[str]) -> Words:
        """Other words in the place of words `first` to `stop`, a space between any two of them."""
        between = (" ",) * (len(words) - 1)
        return Words(
            (*self.words[:first], *words, *self.words[stop:]),
            (*self.gaps[: first + 1], *between, *self.gaps[stop:]),
            (*self.tags[:first], *tags, *self.tags[stop:]),
        )

    def with_inserted(self, index: int, word: str) -> Words:
        """A word, O, before word `index`, or behind the last; an entity would not go on behind it."""
        own = (self.gaps[index], " ") if index < len(self.words) else (" ", self.gaps[-1])
        return Words(
            (*self.words[:index], word, *self.words[index:]),
            (*self.gaps[:index], *own, *self.gaps[index + 1 :]),
            (*self.tags[:index], OUTSIDE, *self.tags[index:]),
        )

    def without(self, index: int) -> Words:
        """The text without a word, and without a space that would be there twice."""
        before, after = self.gaps[index : index + 2]
        joint = before + (after.lstrip() if not before or before[-1].isspace() else after)
        return Words(
            self.words[:index] + self.words[index + 1 :],
            (*self.gaps[:index], joint, *self.gaps[index + 2 :]),
            self.tags[:index] + self.tags[index + 1 :],
        )


def split_text(text: str) -> Words:
    """The words of a raw text.

    >>> split_text("It's well-made, isn't it ?").words
    ("It's", 'well-made', "isn't", 'it')
    """
    return of_spans(text, [found.span() for found in _WORD.finditer(text)])


def of_spans(text: str, spans: Sequence[tuple[int, int]], tags: Sequence[str] | None = None) -> Words:
    """A text with its words, as places in it, and their tags; without these all are O."""
    stops = [0, *(stop for _, stop in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    gaps = tuple(text[stop:start] for stop, start in zip(stops, starts, strict=True))
    words = tuple(text[start:stop] for start, stop in spans)
    return Words(words, gaps, tuple(tags) if tags is not None else (OUTSIDE,) * len(words))


def of_tokens(tokens: Sequence[str], tags: Sequence[str]) -> Words:
    """A list of tagged words."""
    return Words(tuple(tokens), ("", *(" ",) * (len(tokens) - 1), ""), tuple(tags))


def segments(words: Words) -> list[list[int]]:
    """The free words between entities, a list for each stretch without one."""
    bounds = [0, *(place for first, stop, _ in words.entities for place in (first, stop)), len(words.words)]
    return [[index for index in words.free if start <= index < stop] for start, stop in pairwise(bounds)]


def like(word: str, written: str) -> str:
    """A word in capitals where another has them.

    >>> like("movie", "Film"), like("movie", "FILM"), like("movie", "film")
    ('Movie', 'MOVIE', 'movie')
    """
    if len(written) > 1 and written.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if written[:1].isupper() else word
