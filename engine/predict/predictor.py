"""What a task says of its predictions, and the table of tasks that can predict.

A task derives from `Predictor` and registers the class under its head in `PREDICTORS`; reading, packing, computing,
writing, resuming and processes are done for any predictor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.data.labelled.tables import place
from engine.data.text.textfile import without_half_characters
from engine.errors import UserError
from engine.predict.model import ModelFolder
from engine.predict.options import PredictConfig
from engine.predict.rows import Row, input_path
from engine.registry import Registry

#: significant digits of a number that is written: rounding differs from the seventh on
DIGITS = 6


@dataclass(frozen=True)
class Encoded:
    """Sequences that a chunk's rows became: of a row one or several, in any order that the predictor knows."""

    tokens: list[NDArray[np.int32]]
    """ids of each sequence, special tokens included"""
    first_lengths: list[int]
    """tokens of each sequence's first segment"""
    memory: Any = None
    """what `decode` needs of the rows"""
    truncated: int = 0
    """rows whose text was cut"""


class Predictor(ABC):
    """Rows -> sequences -> logits -> new columns, for the head of a model.

    Attributes:
        on_tokens: whether there is a row of logits for each token instead of each sequence.
        options: fields of `PredictConfig` beyond those of every task that it heeds.
        usual: what the column of the text is called where neither the user nor a run names it, the first of these that
            there is; the first one is also what a line of txt becomes.
        columns: the new columns, without the prefix; of one that is an object, its keys, which are columns of their own
            in a table.
    """

    on_tokens: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    usual: ClassVar[tuple[str, ...]] = ("text", "sentence")
    columns: Mapping[str, tuple[str, ...]]

    def __init__(self, model: ModelFolder, config: PredictConfig) -> None:
        """Args: config names the column of the text, and its lengths are those to use.

        Raises:
            UserError: a tokenizer or an option that can't be used with this model.
        """
        self.model, self.config = model, config
        self.length = model.length(config.max_length)
        for name in ("probabilities", "options"):
            given = getattr(config, name)
            if given != getattr(PredictConfig, name) and name not in self.options:
                raise UserError(f"{name}: {given!r} has no effect: {model.head} has no such thing; leave it out")

    @classmethod
    def run_columns(cls, run: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """The columns of text and second text that the section labelled of a run names."""
        return run.get("text"), run.get("text_pair")

    @classmethod
    def more_columns(cls, config: PredictConfig, run: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Options and the further columns that each of them, or the section labelled of a run, names."""
        return ()

    def row_types(self) -> dict[str, Any]:
        """The columns that each row must have, and the type of what they hold."""
        named = (self.config.text, self.config.text_pair)
        return {column: str for column in named if column is not None}

    @abstractmethod
    def column_types(self) -> dict[str, Any]:
        """The type of each new column that `decode` gives; of one that not all rows have, NotRequired."""

    def begin(self, first: Row) -> None:  # noqa: B027  (most have the same columns for all inputs)
        """Look at the first row of an input, where `columns` depends on it."""

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> Encoded:
        """The sequences of a chunk's rows, none longer than `length`.

        Raises:
            UserError: a row that holds no text where it should; names it.
        """

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What is computed of a packed batch of B sequences with T tokens: fp32 [B, classes], or [T, classes]."""
        logits: Tensor = model(**batch)
        return logits

    @abstractmethod
    def decode(self, encoded: Encoded, logits: list[NDArray[np.float32]]) -> list[dict[str, Any]]:
        """The new columns of each row.

        Args:
            logits: of each sequence, [classes], or [its tokens, classes].
        """

    def text(self, row: Row, column: str) -> str:
        """A row's text.

        Raises:
            UserError: the column is missing, or holds no text; names the row.
        """
        return self.checked(self.value(row, column), row, column)

    def value(self, row: Row, column: str) -> Any:
        """What a row's column holds.

        Raises:
            UserError: the column is missing; names the row.
        """
        if column not in row.record:
            have = ", ".join(row.record)
            raise UserError(f"{self._place(row)}: no column {column!r}; it has {have}; give every row the same")
        return row.record[column]

    def checked(self, value: object, row: Row, column: str) -> str:
        """A value of a row's column as a text.

        Raises:
            UserError: it is none; names the row.
        """
        where = self._place(row)
        if value is None or value != value:  # pandas writes null as NaN
            raise UserError(f"{where}: no text in column {column!r}; fill it in or remove the row")
        if not isinstance(value, str):
            raise UserError(f"{where}: column {column!r} holds {value!r:.60}, which is not text; name a column of text")
        return without_half_characters(value)

    def _place(self, row: Row) -> str:
        """The row, for a message."""
        return place(str(input_path(self.config.input)), row.position)


def significant(value: float) -> float:
    """A number without the digits that rounding decides."""
    return float(f"{value:.{DIGITS}g}")


#: the predictors by the head of a model
PREDICTORS: Registry[type[Predictor]] = Registry(
    "model",
    {
        "sequence_classification": "engine.predict.sequence:SequencePredictor",
        "token_classification": "engine.predict.tokens:TokenPredictor",
        "question_answering": "engine.predict.answers:AnswerPredictor",
        "multiple_choice": "engine.predict.choices:ChoicePredictor",
        "embeddings": "engine.predict.embeddings:EmbeddingPredictor",
    },
)


def predictor_class(model: ModelFolder) -> type[Predictor]:
    """The predictor of a model's head.

    Raises:
        UserError: there is none.
    """
    if model.head not in PREDICTORS.names:
        known = " or ".join(PREDICTORS.names)
        raise UserError(f"model: {model.folder} has a head for {model.head}, which can't predict yet; give {known}")
    return PREDICTORS.get(model.head)


def predictor_of(model: ModelFolder, config: PredictConfig) -> Predictor:
    """The predictor of a model.

    Raises:
        UserError: there is none, or what its class raises.
    """
    return predictor_class(model)(model, config)
