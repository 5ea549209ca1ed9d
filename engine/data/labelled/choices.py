"""Questions with options, of which one is right. Shapes: Q questions, S sequences (a question with an option each)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import LabelledConfig
from engine.data.labelled.classes import held_out, select
from engine.data.labelled.encoded import EncodedTexts
from engine.data.labelled.files import Examples, read_with, text_of
from engine.data.labelled.groups import GroupedSource
from engine.data.labelled.tables import Columns, columns_in, of_field
from engine.data.loading.source import Indices
from engine.errors import UserError


@dataclass(frozen=True)
class Questions(Examples):
    """Texts with options each; `pairs`, where there are any, are the beginnings of all options of a text."""

    options: list[list[str]] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    """which option of each question is right, from 0"""

    def sequences(self) -> tuple[list[str], list[str]]:
        """First and second text of each sequence [S]: the options of a question one after the other."""
        starts = [""] * len(self) if self.pairs is None else [f"{pair} " for pair in self.pairs]
        firsts = [text for text, options in zip(self.texts, self.options, strict=True) for _ in options]
        seconds = [
            f"{start}{option}" for start, options in zip(starts, self.options, strict=True) for option in options
        ]
        return firsts, seconds


def read_questions(path: str, text: str, text_pair: str | None, options: str, label: str) -> Questions:
    """Read questions with options.

    Args:
        path: as of `read_examples`.
        text: column of what comes first: a context, or the question.
        text_pair: column of what all options of a row begin with, such as the question after a context.
        options: a column of lists of texts; or several columns of one text each, see `columns_in`.
        label: column of the right option's index from 0, or of its letter from A.

    Raises:
        UserError: as `read_examples`; fewer than two options, one that is no text, or a label that names none of them.
    """
    names = columns_in(options)
    if not names:
        raise UserError(f"labelled.options: {options!r} is not allowed; give a column of lists, or several as a,b,c")
    found: list[list[str]] = []
    right: list[int] = []

    def read(record: Mapping[str, Any], where: str, declared: tuple[str, ...] | None) -> str:
        given = [record[name] for name in names] if len(names) > 1 else record[names[0]]
        found.append(options_of(given, names, where))
        right.append(_right(record[label], label, len(found[-1]), where))
        return str(right[-1])

    columns = Columns(text, text_pair, label, of_field("labelled.options", names))
    read_ = read_with(path, columns, read)
    return Questions(path, read_.texts, read_.pairs, read_.labels, read_.positions, None, found, right)


def options_of(given: object, names: Sequence[str], where: str) -> list[str]:
    """The options of a question.

    Args:
        given: a list of texts.
        names: the column that holds it, or the column of each.
        where: file and row, for a message.

    Raises:
        UserError: no list, fewer than two options, or one that is no text.
    """
    if not isinstance(given, list):
        raise UserError(f"{where}: column {names[0]!r} holds {given!r:.60}; give a list of at least two texts")
    if len(given) < 2:
        raise UserError(f"{where}: {len(given)} option(s) in column {names[0]!r}; give at least two")
    columns = names if len(names) > 1 else [f"{names[0]}[{index}]" for index in range(len(given))]
    return texts_of(given, columns, where)


def texts_of(given: Sequence[object], columns: Sequence[str], where: str) -> list[str]:
    """Texts as they are, each from its column.

    Raises:
        UserError: one is missing, blank or no text.
    """
    return [text_of(text, column, where) for text, column in zip(given, columns, strict=True)]


def _right(value: object, column: str, count: int, where: str) -> int:
    """The index that a label tells."""
    text = str(value).strip()
    index = -1
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        if text.isdecimal():
            index = int(text)
        elif len(text) == 1 and text.isascii() and text.isalpha():
            index = ord(text.upper()) - ord("A")
    if not 0 <= index < count:
        last = f"0 to {count - 1}, or a letter from A to {chr(ord('A') + min(count, 26) - 1)}"
        raise UserError(f"{where}: label {value!r:.60} in column {column!r} names none of {count} options; give {last}")
    return index


def split_questions(training: Questions, labelled: LabelledConfig, seed: int) -> tuple[Questions, Questions]:
    """Training questions and those of them that are held out for validation.

    Raises:
        UserError: too few questions to hold any out.
    """
    kept, held = (_select(training, part) for part in held_out(labelled, [""] * len(training), seed))
    return kept, held


def _select(questions: Questions, indices: Sequence[int]) -> Questions:
    chosen = select(questions, indices)
    assert isinstance(chosen, Questions)
    return replace(
        chosen,
        options=[questions.options[index] for index in indices],
        right=[questions.right[index] for index in indices],
    )


class ChoiceSource(GroupedSource):
    """Encoded questions: a sample is a question, whose options are sequences of a batch one after the other.

    A batch also carries labels [Q], the right options' indices; question [S], each sequence's question among those of
    the batch; and option [S], its place among that question's options.
    """

    def __init__(
        self,
        encoded: EncodedTexts,
        counts: Sequence[int],
        right: Sequence[int],
        seed: int,
        fixed: bool = False,
        group: int | None = None,
    ) -> None:
        """
        Args:
            encoded: of the sequences [S].
            counts: options of each question, [Q].
            right: index of the right one, [Q].
        """
        super().__init__(encoded, counts, seed, fixed, group)
        self.labels = np.array(right, dtype=np.int64)

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        return super().totals(epoch, indices) | {"questions": float(len(indices))}

    def targets(self, examples: Indices) -> dict[str, NDArray[Any]]:
        """labels [Q]; question and option [S]."""
        question = np.repeat(np.arange(len(examples)), self.counts[examples])
        return {"labels": self.labels[examples], "question": question, "option": self.places(examples)}
