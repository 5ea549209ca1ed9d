"""Predictions of a head on tokens: spans of a text, such as names, and tags of words that are given as a list.

Words of a text are those of training (`words_of`), and each has the label of its first piece. A text longer than the
model reads is cut into overlapping windows, and each piece is scored in the window that shows most around it. Words are
joined as transformers' pipeline joins them with aggregation_strategy="first": B- begins a span (S- and U- too), another
prefix goes on with one of its type, or begins one where there is none. Labels without a prefix go on too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import NotRequired, TypedDict

from engine.config import LabelledConfig
from engine.data.labelled.tagged.encoded import FRAME, first_pieces
from engine.data.labelled.tagged.files import TEXT_COLUMNS, join_tokens
from engine.data.labelled.tagged.schemes import OUTSIDE
from engine.data.labelled.tagged.spans import Ranges, words_of
from engine.data.labelled.windows import best_seen, windows
from engine.errors import UserError
from engine.predict.model import ModelFolder
from engine.predict.options import PredictConfig
from engine.predict.predictor import Encoded, Predictor, significant
from engine.predict.rows import Row
from engine.predict.sequence import softmax

#: what a label begins with that begins a span, and what one does that goes on with one
BEGINS, GOES_ON = ("B-", "S-", "U-"), ("I-", "E-", "L-", "M-")


@dataclass(frozen=True)
class Words:
    """A row's words and pieces."""

    text: str
    listed: bool
    """whether the row has a list of words"""
    places: Ranges
    """where in the text each word starts and stops"""
    first: NDArray[np.int64]
    """the first piece of each word; -1 of a word that the tokenizer deletes"""
    windows: list[tuple[int, int]]
    """of pieces"""
    pieces: int


class Entity(TypedDict):
    """What the column `entities` holds of a span."""

    type: str
    start: int
    end: int
    text: str
    confidence: float


class TokenPredictor(Predictor):
    """The predictor of "token_classification"."""

    on_tokens: ClassVar[bool] = True
    usual: ClassVar[tuple[str, ...]] = ("text", *(name for name in TEXT_COLUMNS if name != "text"), "sentence")

    def __init__(self, model: ModelFolder, config: PredictConfig) -> None:
        super().__init__(model, config)
        if config.text_pair is not None:
            raise UserError(f"text_pair: {config.text_pair!r} has no effect: spans are of one text; leave it out")
        self.names, self.columns = model.names, {"entities": ()}
        self._room = self.length - FRAME
        stride = model.run.get("stride")
        self._overlap = min(self.length // 3 if stride is None else stride, self._room - 1)

    @classmethod
    def run_columns(cls, run: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """A name that the user gave; CoNLL files have numbers."""
        name = run.get("text")
        return None if name is None or name == LabelledConfig.text or name.lstrip("-").isdigit() else name, None

    def row_types(self) -> dict[str, Any]:
        return {str(self.config.text): str | list[str]}

    def column_types(self) -> dict[str, Any]:
        return {"entities": list[Entity], "tags": NotRequired[list[str]]}

    def begin(self, first: Row) -> None:
        if isinstance(first.record.get(str(self.config.text)), (list, tuple)):
            self.columns = {"tags": (), "entities": ()}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        words = self.model.vocabulary
        found = [self._words(row) for row in rows]
        encodings = words.backend.encode_batch([text for text, *_ in found], add_special_tokens=False)
        memory, tokens = [], []
        for (text, listed, places), encoding in zip(found, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            first = first_pieces(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2), places)
            cut = windows(len(ids), self._room, self._overlap)
            memory.append(Words(text, listed, places, first, cut, len(ids)))
            for start, stop in cut:
                tokens.append(np.array([words.cls_id, *ids[start:stop], words.sep_id], dtype=np.int32))
        return Encoded(tokens, [len(ids) for ids in tokens], memory)

    def _words(self, row: Row) -> tuple[str, bool, Ranges]:
        """A row's text, whether it is a list of words, and where they are in it."""
        column = str(self.config.text)
        given = row.record.get(column)
        if not isinstance(given, (list, tuple)):
            text = self.text(row, column)
            return text, False, words_of(text)
        tokens = [self.checked(token, row, column) for token in given]
        text, places = join_tokens(tokens) if tokens else ("", words_of(""))
        return text, True, places

    def decode(self, encoded: Encoded, logits: list[NDArray[np.float32]]) -> list[dict[str, Any]]:
        rows, taken = [], 0
        for words in encoded.memory:
            own = logits[taken : taken + len(words.windows)]
            taken += len(words.windows)
            rows.append(self._row(words, own))
        return rows

    def _row(self, words: Words, logits: list[NDArray[np.float32]]) -> dict[str, Any]:
        """The columns of a row, from the logits of its windows, [pieces + 2, classes] each."""
        labels, confidences = self._labels(words, logits)
        spans = []
        for kind, first, behind in joined(labels):
            start, stop = int(words.places[first, 0]), int(words.places[behind - 1, 1])
            place = {"start": first, "end": behind} if words.listed else {"start": start, "end": stop}
            confidence = significant(float(confidences[first:behind].mean()))
            spans.append({"type": kind, **place, "text": words.text[start:stop], "confidence": confidence})
        return {"tags": labels, "entities": spans} if words.listed else {"entities": spans}

    def _labels(self, words: Words, logits: list[NDArray[np.float32]]) -> tuple[list[str], NDArray[np.float64]]:
        """The label of each word, and its probability.

        A word that the tokenizer deletes is O, and one in the same piece as the word before goes on with its span.
        """
        if not words.pieces or not len(words.first):
            return [OUTSIDE] * len(words.first), np.ones(len(words.first))
        chosen = best_seen(words.pieces, words.windows) if len(logits) > 1 else [0] * words.pieces
        pieces = np.maximum(words.first, 0).tolist()
        rows = [logits[chosen[piece]][1 + piece - words.windows[chosen[piece]][0]] for piece in pieces]
        probabilities = softmax(np.stack(rows).astype(np.float64))
        labels = [self.names[index] for index in probabilities.argmax(axis=1)]
        for index, piece in enumerate(words.first.tolist()):
            if piece < 0:
                labels[index] = OUTSIDE
            elif index and piece == words.first[index - 1]:
                labels[index] = labels[index - 1].replace("B-", "I-", 1)
        return labels, probabilities.max(axis=1)


def joined(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans of words' labels: type, first word, and the word behind the last.

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
