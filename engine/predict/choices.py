"""Predictions of a head on choices: which of a question's options is right.

Each option is a sequence, question first, as in training. Shapes: O options of a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NewType

import numpy as np
from numpy.typing import NDArray

from engine.config import LabelledConfig
from engine.data.labelled.choices import Questions, options_of
from engine.data.labelled.encoded import truncating
from engine.data.labelled.tables import columns_in, of_field
from engine.data.text.textfile import without_half_characters
from engine.errors import UserError
from engine.model.pretrained import check_segments
from engine.predict.model import ModelFolder
from engine.predict.options import PredictConfig
from engine.predict.predictor import Encoded, Predictor, significant
from engine.predict.rows import Row
from engine.predict.sequence import sequences, softmax

#: a text that isn't blank
Option = NewType("Option", str)


class ChoicePredictor(Predictor):
    """The predictor of "multiple_choice"."""

    options: ClassVar = ("probabilities", "options")
    usual: ClassVar[tuple[str, ...]] = ("question", "text", "sentence")

    def __init__(self, model: ModelFolder, config: PredictConfig) -> None:
        super().__init__(model, config)
        check_segments(model.config, str(model.folder), "an option behind its question")
        self.columns = {"choice": (), "label": (), "confidence": ()}
        self.columns |= {"probabilities": ()} if config.probabilities else {}
        self._names = option_columns(config, model.run)
        self._tokenizer = truncating(model.vocabulary, self.length)

    @classmethod
    def more_columns(cls, config: PredictConfig, run: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Those of the options."""
        return of_field("options", option_columns(config, run))

    def row_types(self) -> dict[str, Any]:
        kind: Any = Option if len(self._names) > 1 else list[Option]
        return super().row_types() | dict.fromkeys(self._names, kind)

    def column_types(self) -> dict[str, Any]:
        types = {"choice": int, "label": str, "confidence": float, "probabilities": list[float]}
        return {column: types[column] for column in self.columns}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        assert self.config.text is not None
        column, texts = self.config.text_pair, [self.text(row, self.config.text) for row in rows]
        pairs = None if column is None else [self.text(row, column) for row in rows]
        options = [self._options(row) for row in rows]
        questions = Questions("", texts, pairs, [""] * len(rows), [], None, options)
        inputs = list(zip(*questions.sequences(), strict=True))
        tokens, first_lengths, cut = sequences(self._tokenizer, inputs, self.length)
        truncated = sum(any(part) for part in _parts(cut, options))
        return Encoded(tokens, first_lengths, options, truncated)

    def _options(self, row: Row) -> list[str]:
        values = [self.value(row, name) for name in self._names]
        given = values if len(values) > 1 else values[0]
        listed = list(given) if isinstance(given, tuple) else given
        return [without_half_characters(option) for option in options_of(listed, self._names, self._place(row))]

    def decode(self, encoded: Encoded, logits: list[NDArray[np.float32]]) -> list[dict[str, Any]]:
        pairs = zip(encoded.memory, _parts(logits, encoded.memory), strict=True)
        return [self._row(options, np.concatenate(own).astype(np.float64)) for options, own in pairs]

    def _row(self, options: Sequence[str], logits: NDArray[np.float64]) -> dict[str, Any]:
        """[O] as the columns of a question."""
        probabilities = softmax(logits)
        best = int(probabilities.argmax())
        row: dict[str, Any] = {"choice": best, "label": options[best]}
        row["confidence"] = significant(float(probabilities[best]))
        if self.config.probabilities:
            row["probabilities"] = [significant(value) for value in probabilities.tolist()]
        return row


def option_columns(config: PredictConfig, run: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of the options: as given, else those of the run, else options.

    Raises:
        UserError: the option names none.
    """
    given = config.options if config.options is not None else run.get("options") or LabelledConfig.options
    names = columns_in(given)
    if not names:
        raise UserError(f"options: {given!r} is not allowed; give a column of lists, or several as a,b,c")
    return names


def _parts(values: Sequence[Any], options: Sequence[Sequence[str]]) -> list[Sequence[Any]]:
    """What there is of each sequence, by the question whose options they are."""
    ends = np.cumsum([len(each) for each in options]).tolist()
    return [values[end - len(each) : end] for end, each in zip(ends, options, strict=True)]
