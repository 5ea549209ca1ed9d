"""Words of a raw text, and the tags that spans of its characters give them.

Shapes: W words of a text.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.labelled.tagged.schemes import OUTSIDE
from engine.errors import UserError

#: scripts without spaces between words, or whose words end in particles that no entity has: each character is a word
_SINGLE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_SINGLE += "\U00020000-\U0003ffff"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Ranges = NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """A labelled part of a text: characters `start` to `stop`, without the last."""

    start: int
    stop: int
    label: str

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop}, {self.label!r}]"


@cache
def _word() -> re.Pattern[str]:
    """What is one word: letters, marks and digits between spaces and punctuation, or one character of other kinds."""
    marks = (c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] in "PS")
    runs = groupby(enumerate(marks), key=lambda pair: pair[1] - pair[0])
    ranges = [[c for _, c in run] for _, run in runs]
    single = "".join(f"{re.escape(chr(run[0]))}-{re.escape(chr(run[-1]))}" for run in ranges) + _SINGLE
    return re.compile(rf"[{single}]|[^\s{single}]+")


def words_of(text: str) -> Ranges:
    """Where the words of a text start and stop, int64 [W, 2]; no tokenizer has a say in it.

    >>> words_of("in New-York.").tolist()
    [[0, 2], [3, 6], [6, 7], [7, 11], [11, 12]]
    """
    return np.array([found.span() for found in _word().finditer(text)], dtype=np.int64).reshape(-1, 2)


def read_spans(value: object, text: str, column: str, where: str) -> list[Span]:
    """The spans of a text in order: lists [start, end, label], or objects with these names.

    Raises:
        UserError: no spans, a place that is no whole number, outside of the text or empty, or spans that overlap.
    """
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: column {column!r} holds {value!r:.60}; give a list of [start, end, label], or []")
    spans = sorted((_span(each, text, where) for each in value), key=lambda span: (span.start, span.stop))
    for before, span in pairwise(spans):
        if span.start < before.stop:
            raise UserError(f"{where}: spans {before} and {span} overlap; a word has one tag: keep one of them")
    return spans


def _span(value: Any, text: str, where: str) -> Span:
    if isinstance(value, Mapping):
        parts: Sequence[Any] = [value.get(name) for name in ("start", "end", "label")]
    else:
        parts = value if isinstance(value, (list, tuple)) else ()
    if len(parts) != 3 or any(part is None for part in parts):
        raise UserError(f"{where}: span {value!r:.60}; write [start, end, label], or an object with these names")
    start, stop, label = parts
    if type(start) is not int or type(stop) is not int:
        raise UserError(f"{where}: span {value!r:.60}: start and end are whole numbers of characters")
    if not 0 <= start < stop <= len(text):
        raise UserError(
            f"{where}: span {value!r:.60} is not within the text of {len(text)} characters; start counts from 0, "
            "end is behind the last one"
        )
    if not isinstance(label, str) or not label.strip() or _CONTROL.search(label):
        raise UserError(f"{where}: span {value!r:.60}: its label is no name; write a text of one line")
    return Span(start, stop, label.strip())


def tags_of(words: Ranges, spans: Sequence[Span], where: str) -> tuple[list[str], int]:
    """The BIO tag of each word, and how many spans begin or end inside of a word and are widened to all of it.

    Args:
        words: of the text, as `words_of` gives them.

    Raises:
        UserError: a span without a word, or two with the same.
    """
    tags, widened = [OUTSIDE] * len(words), 0
    for span in spans:
        first = int(np.searchsorted(words[:, 1], span.start, "right"))
        last = int(np.searchsorted(words[:, 0], span.stop, "left"))
        if first >= last:
            raise UserError(f"{where}: span {span} holds white space alone; correct its places")
        if tags[first] != OUTSIDE:
            raise UserError(f"{where}: span {span} begins in the word that the one before ends in; a word has one tag")
        tags[first:last] = [f"B-{span.label}"] + [f"I-{span.label}"] * (last - first - 1)
        widened += bool(words[first, 0] < span.start or words[last - 1, 1] > span.stop)
    return tags, widened
