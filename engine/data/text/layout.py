"""Tells what a line of some text is: a sentence, a paragraph, or as much as fits the width of a page.

BERT's own format has one sentence per line, books are wrapped, and many corpora have one paragraph per line. A line
break inside a paragraph ends a sentence in the first and the third and is a space in the second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from engine.data.text.sentences import Lines, split_sentences

_BLANK_LINE = re.compile(r"\n\s*\n")
#: ends of sentences of the scripts that have any, and what may follow them
_STOPS = tuple(".!?…‽。！？｡．।॥؟۔։።။")
_CLOSERS = "\"'”’»)]}」』*_"
#: endings of a line after which the sentence goes on: of verse, and of lines that are broken at will
_CONTINUES = (",", ";", "-", "–", "—", "，", "、", "；", "،")
#: wrapped prose has lines of at least so many characters
_NARROWEST = 40
#: scripts from here on are written without spaces, so that a line can break before any character
_NO_SPACES = "\u2e80"

_NEARLY_NO_STOPS = 0.05
_NEARLY_ALL_END = 0.8
_MANY_CONTINUE = 0.1
#: extra sentences per line that a splitter finds by mistake in lines of one sentence each
_MISTAKES = 0.25


@dataclass(frozen=True)
class LineStatistics:
    """Statistics of the lines that have another line below them in their paragraph; shares are in [0, 1]."""

    breaks: int
    ending: float
    """share that ends as a sentence does"""
    continuing: float
    """share that ends in a comma or the like"""
    filled: float
    """share with no room for the next line's first word"""
    width: int
    """length that nine of ten lines don't exceed, in characters"""
    into_lower: float
    """share followed by a line that begins with a lower-case letter, in paragraphs that don't begin with one"""
    inner_ends: float
    """mean number of sentence ends inside a line"""
    stops: float
    """mean number of sentence ends per line, the last lines of paragraphs included"""


def measure(texts: Iterable[str], language: str) -> LineStatistics | None:
    """The statistics of some documents; None where no paragraph has two lines."""
    paragraphs = list(_paragraphs(texts))
    pairs = [pair for lines in paragraphs for pair in pairwise(lines)]
    if not pairs:
        return None
    count = len(pairs)
    width = sorted(len(upper) for upper, _ in pairs)[int(0.9 * count)]
    lines = [line for paragraph in paragraphs for line in paragraph]
    inner_ends = max(0, len(split_sentences("\n".join(lines), language, "paragraph")) - len(lines)) / len(lines)
    return LineStatistics(
        breaks=count,
        ending=sum(_stops(upper) for upper, _ in pairs) / count,
        continuing=sum(upper.endswith(_CONTINUES) for upper, _ in pairs) / count,
        filled=sum(len(upper) + 1 + _first_word(lower) > width for upper, lower in pairs) / count,
        width=width,
        into_lower=sum(_small_followers(lines) for lines in paragraphs) / count,
        inner_ends=inner_ends,
        stops=inner_ends + sum(map(_stops, lines)) / len(lines),
    )


def _paragraphs(texts: Iterable[str]) -> Iterator[list[str]]:
    """The lines of each paragraph that has several."""
    for text in texts:
        for paragraph in _BLANK_LINE.split(text.replace("\r\n", "\n")):
            lines = [line for part in paragraph.split("\n") if (line := part.strip())]
            if len(lines) > 1:
                yield lines


def _stops(line: str) -> bool:
    return line.rstrip(_CLOSERS).endswith(_STOPS)


def _small_followers(lines: list[str]) -> int:
    """Number of lines that begin with a lower-case letter; 0 where the first does, since it tells nothing there."""
    return 0 if lines[0][0].islower() else sum(line[0].islower() for line in lines)


def _first_word(line: str) -> int:
    """Length of the line's first word in characters: the room that it would have needed in the line above."""
    return 1 if line[0] >= _NO_SPACES else len(line.split(None, 1)[0])


def judge(layout: LineStatistics | None) -> Lines:
    """What the lines are; "wrapped" where there is nothing to tell from."""
    if layout is None:
        return "wrapped"
    whole: Lines = "sentence" if layout.inner_ends < _MISTAKES else "paragraph"
    if layout.ending >= _NEARLY_ALL_END:
        return whole
    if layout.continuing >= _MANY_CONTINUE:
        return "wrapped"
    if layout.stops < _NEARLY_NO_STOPS:
        return whole
    full = layout.filled >= 0.5 and layout.width >= _NARROWEST
    runs_on = layout.ending < 0.5 and layout.into_lower >= 0.5 and layout.inner_ends > layout.ending
    return "wrapped" if full or runs_on else whole
