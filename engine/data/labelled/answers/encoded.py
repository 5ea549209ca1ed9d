"""Questions and contexts as windows of tokens: the question first, then a piece of the context.

Devlin et al. 2019, section 4.2 and 4.3: the answer is the span of tokens between its first and its last one; a window
that doesn't hold it learns position 0, the token that stands for the whole sequence.

Shapes: N questions, W windows, P pieces (tokens) of a context.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.data.labelled.answers.files import Question
from engine.data.labelled.encoded import ENCODING_CHUNK, EncodedTexts
from engine.data.labelled.windows import windows
from engine.data.loading.source import Indices
from engine.errors import UserError

#: what to do about a question that leaves too little room
REMEDY = "raise labelled.max_length, or lower labelled.stride"
#: marks that belong to the character before them, and formatting characters; a tokenizer may drop them
_DEPENDENT = ("Mn", "Me", "Cf")


@dataclass(frozen=True)
class Pieces:
    """The tokens of a text."""

    ids: NDArray[np.int32]
    """[P]"""
    spans: NDArray[np.int64]
    """characters of the text that each stands for, without white space at their ends, as start and stop, [P, 2]"""


@dataclass(frozen=True)
class AnswerWindows:
    """Windows over the contexts of N questions, in the questions' order."""

    encoded: EncodedTexts
    """of W windows; their full lengths are their lengths, for nothing is cut"""
    question: Indices
    """the question of each window, [W]"""
    context: NDArray[np.int64]
    """tokens of each window that are the context's, as start and stop, [W, 2]"""
    first: Indices
    """the piece of the context that comes first in each window, [W]"""
    answer: NDArray[np.int64]
    """first and last token of the first answer in each window, (0, 0) where it isn't whole there, [W, 2]"""
    spans: list[NDArray[np.int64]]
    """of each question the spans of its context's pieces, [P, 2] each"""


@dataclass(frozen=True)
class _Frame:
    """The special tokens around a pair, and how its segments are numbered."""

    before: NDArray[np.int32]
    between: NDArray[np.int32]
    after: NDArray[np.int32]
    first_segment: int | None
    """tokens of `between` that are of the first segment; None where all are of one segment"""

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def encode_questions(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    max_length: int,
    overlap: int,
    remedy: str = REMEDY,
    empty: bool = False,
) -> AnswerWindows:
    """Windows of at most `max_length` tokens; two that follow each other share `overlap` pieces of the context.

    Args:
        tokenizer: as `framed` makes it of a vocabulary.
        remedy: what to do about a question that leaves too little room, for the message.
        empty: whether a context may have no piece at all; it has one window then.

    Raises:
        UserError: a question that leaves no room for its context, or a context or answer that is no piece at all.
    """
    frame = _frame(tokenizer)
    asked = [piece.ids for piece in pieces_of(tokenizer, [question.text for question in questions])]
    contexts = {text: number for number, text in enumerate(dict.fromkeys(question.context for question in questions))}
    pieces = pieces_of(tokenizer, list(contexts))
    tokens: list[NDArray[np.int32]] = []
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    for number, question in enumerate(questions):
        context = pieces[contexts[question.context]]
        head = np.concatenate([frame.before, asked[number], frame.between])
        if not len(context.ids) and not empty:
            raise UserError(f"{question.place}: the tokenizer finds nothing in the context; correct it")
        room = max_length - frame.size - len(asked[number])
        if room < max(len(context.ids), 1) and room <= overlap:
            raise _no_room(question, len(asked[number]), room, overlap, remedy)
        place = _place(question, context.spans)
        segment = None if frame.first_segment is None else len(head) - len(frame.between) + frame.first_segment
        for start, stop in windows(len(context.ids), room, overlap if room > overlap else 0):
            ids = np.concatenate([head, context.ids[start:stop], frame.after])
            answer = _in_window(place, start, stop, len(head))
            tokens.append(ids)
            rows.append((number, len(head), len(head) + stop - start, start, *answer, segment or len(ids)))
    table = np.array(rows, dtype=np.int64)
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    encoded = EncodedTexts(np.concatenate(tokens), offsets, table[:, 6].astype(np.int32), lengths)
    spans = [pieces[contexts[question.context]].spans for question in questions]
    return AnswerWindows(encoded, table[:, 0], table[:, 1:3], table[:, 3], table[:, 4:6], spans)


def pieces_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Pieces]:
    """The tokens of each text, without special tokens around them."""
    found = []
    for start in range(0, len(texts), ENCODING_CHUNK):
        chunk = list(texts[start : start + ENCODING_CHUNK])
        for text, encoding in zip(chunk, tokenizer.encode_batch(chunk, add_special_tokens=False), strict=True):
            spans = np.array(_exact(text, encoding.offsets), dtype=np.int64).reshape(-1, 2)
            found.append(Pieces(np.array(encoding.ids, dtype=np.int32), spans))
    return found


def _exact(text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets of pieces without the white space at their ends, and with the marks that the tokenizer dropped."""
    trimmed = []
    for start, stop in offsets:
        part = text[start:stop]
        if part and (part[0].isspace() or part[-1].isspace()):
            start, stop = stop - len(part.lstrip()), start + len(part.rstrip())
        trimmed.append((start, max(start, stop)))
    if text.isascii() or not trimmed:
        return trimmed
    following = [start for start, _ in trimmed[1:]] + [len(text)]
    return [(start, _with_marks(text, stop, limit)) for (start, stop), limit in zip(trimmed, following, strict=True)]


def _with_marks(text: str, stop: int, limit: int) -> int:
    while stop < limit and unicodedata.category(text[stop]) in _DEPENDENT:
        stop += 1
    return stop


def _frame(tokenizer: Tokenizer) -> _Frame:
    pair = tokenizer.encode("a", "a")
    sides, ids, types = pair.sequence_ids, np.array(pair.ids, dtype=np.int32), pair.type_ids
    one, other = sides.index(0), sides.index(1)
    begin, end = one + sides.count(0), other + sides.count(1)
    segment = types[begin:other].count(0) if types[other] == 1 else None
    return _Frame(ids[:one], ids[begin:other], ids[end:], segment)


def _no_room(question: Question, asked: int, room: int, overlap: int, remedy: str) -> UserError:
    """What to say of a question of `asked` tokens that leaves `room` for pieces of its context."""
    return UserError(
        f"{question.place}: the question has {asked} tokens and leaves room for {max(room, 0)} of the context, "
        f"which must be more than the {overlap} that windows share; {remedy}"
    )


def _place(question: Question, spans: NDArray[np.int64]) -> tuple[int, int] | None:
    """The first and the last piece of the first answer; None without one."""
    if not question.answers:
        return None
    start, stop = question.answers[0].span
    first = int(np.searchsorted(spans[:, 1], start, side="right"))
    last = int(np.searchsorted(spans[:, 0], stop, side="left")) - 1
    if last < first:
        answer = question.answers[0].text
        raise UserError(f"{question.place}: the tokenizer finds nothing in answer {answer!r}; correct it")
    return first, last


def _in_window(place: tuple[int, int] | None, start: int, stop: int, head: int) -> tuple[int, int]:
    """First and last token of an answer in a window over the pieces `start` to `stop`."""
    if place is None or place[0] < start or place[1] >= stop:
        return 0, 0
    return place[0] - start + head, place[1] - start + head
