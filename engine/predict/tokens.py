"""Predictions of a head on tokens: spans of a text, such as names, in characters of the text as it was given.

A text longer than the model reads is cut into overlapping windows, and each piece is scored in the window that shows
most around it. A word is what the tokenizer splits off before it cuts pieces; it has the label of its first piece, as
transformers' pipeline gives with aggregation_strategy="first". Labels are B-X, I-X (also E-, S-, L- and U-), or X.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from engine.data.labelled.windows import best_seen, windows
from engine.errors import UserError
from engine.predict.model import ModelFolder
from engine.predict.options import PredictConfig
from engine.predict.predictor import Encoded, Predictor, significant
from engine.predict.rows import Row
from engine.predict.sequence import softmax

#: share of a window that the next one shows again
OVERLAP = 0.25
OUTSIDE = "O"
#: what a label begins with that starts a span, and what one does that goes on with one
BEGINS, GOES_ON = ("B-", "S-", "U-"), ("I-", "E-", "L-")


@dataclass(frozen=True)
class Text:
    """A text in pieces."""

    text: str
    starts: list[int]
    """of each word, in characters"""
    stops: list[int]
    pieces: list[int]
    """the first piece of each word"""
    windows: list[tuple[int, int]]
    count: int
    """pieces"""


class TokenPredictor(Predictor):
    """The predictor of "token_classification"."""

    on_tokens: ClassVar[bool] = True

    def __init__(self, model: ModelFolder, config: PredictConfig) -> None:
        super().__init__(model, config)
        if config.text_pair is not None:
            raise UserError(f"text_pair: {config.text_pair!r} has no effect: spans are of one text; leave it out")
        self.names, self.columns = model.names, {"entities": ()}
        self._room = self.length - 2
        self._overlap = int(self._room * OVERLAP)

    def encode(self, rows: Sequence[Row]) -> Encoded:
        assert self.config.text is not None
        words = self.model.vocabulary
        texts = [self.text(row, self.config.text) for row in rows]
        memory, tokens = [], []
        for text, encoding in zip(texts, words.backend.encode_batch(texts, add_special_tokens=False), strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            own = _in_words(text, encoding.word_ids, encoding.offsets, windows(len(ids), self._room, self._overlap))
            memory.append(own)
            for start, stop in own.windows:
                frame = ([words.cls_id], ids[start:stop], [words.sep_id])
                tokens.append(np.concatenate(frame, dtype=np.int32, casting="unsafe"))
        return Encoded(tokens, [len(ids) for ids in tokens], memory)

    def decode(self, encoded: Encoded, logits: list[NDArray[np.float32]]) -> list[dict[str, Any]]:
        rows, taken = [], 0
        for text in encoded.memory:
            own = logits[taken : taken + len(text.windows)]
            taken += len(text.windows)
            rows.append({"entities": self._spans(text, own)})
        return rows

    def _spans(self, text: Text, logits: list[NDArray[np.float32]]) -> list[dict[str, Any]]:
        """The spans of a text, from the logits of its windows, [pieces + 2, classes] each."""
        if not text.pieces:
            return []
        best = best_seen(text.count, text.windows) if len(logits) > 1 else [0] * text.count
        first = [logits[best[piece]][1 + piece - text.windows[best[piece]][0]] for piece in text.pieces]
        probabilities = softmax(np.stack(first).astype(np.float64))
        labels = [self.names[index] for index in probabilities.argmax(axis=1)]
        confidences = probabilities.max(axis=1)
        spans = []
        for kind, start, stop in joined(labels):
            begin, end = text.starts[start], text.stops[stop - 1]
            spans.append(
                {
                    "type": kind,
                    "start": begin,
                    "end": end,
                    "text": text.text[begin:end],
                    "confidence": significant(float(confidences[start:stop].mean())),
                }
            )
        return spans


def _in_words(
    text: str, numbers: Sequence[int | None], offsets: Sequence[tuple[int, int]], cut: list[tuple[int, int]]
) -> Text:
    """A text's words, from the word of each of its pieces; a piece of none, such as a special token, is one itself."""
    own = [number if number is not None else -1 - piece for piece, number in enumerate(numbers)]
    starts, stops, pieces = [], [], []
    for _, group in groupby(range(len(own)), key=own.__getitem__):
        members = list(group)
        start, stop = offsets[members[0]][0], offsets[members[-1]][1]
        # byte-level pieces hold the space before a word
        starts.append(start + len(text[start:stop]) - len(text[start:stop].lstrip()))
        stops.append(stop)
        pieces.append(members[0])
    return Text(text, starts, stops, pieces, cut, len(own))


def joined(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans of words' labels: type, first word, and the word after the last.

    A word begins a span where its label says so or its type is another than that of the word before.

    >>> joined(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "MISC", "MISC"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5), ('MISC', 5, 7)]
    """
    spans: list[tuple[str, int, int]] = []
    before = OUTSIDE
    for index, label in enumerate(labels):
        kind = label[2:] if label.startswith((*BEGINS, *GOES_ON)) else label
        if kind != OUTSIDE and kind == before and not label.startswith(BEGINS):
            spans[-1] = (kind, spans[-1][1], index + 1)
        elif kind != OUTSIDE:
            spans.append((kind, index, index + 1))
        before = kind
    return spans
