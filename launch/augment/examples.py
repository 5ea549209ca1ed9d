"""Rows as examples: which of their columns are texts, and a row with other texts in their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.config import LabelledConfig
from engine.data.augment.words import Words, of_spans, of_tokens, split_text
from engine.data.labelled.files import text_of
from engine.data.labelled.tables import place
from engine.data.labelled.tagged.files import TaggedTexts, read_tagged
from engine.data.labelled.tagged.spans import Span, tags_of, words_of
from engine.errors import require
from engine.predict.rows import InputColumns, Row, peek, read_rows
from launch.augment.options import TAGS, USUAL, AugmentConfig


class Examples(Protocol):
    """How the rows of an input are texts."""

    def texts(self, row: Row) -> list[Words]:
        """The texts of a row that are changed."""
        ...

    def row(self, row: Row, texts: Sequence[Words]) -> Row:
        """The same row with other texts."""
        ...


@dataclass(frozen=True)
class Texts:
    """Rows with columns of texts; all others are copied."""

    path: str
    columns: tuple[str, ...]

    def texts(self, row: Row) -> list[Words]:
        """See `Examples`.

        Raises:
            UserError: one is empty, or no text.
        """
        where = place(self.path, row.position)
        return [split_text(text_of(row.record.get(name), name, where)) for name in self.columns]

    def row(self, row: Row, texts: Sequence[Words]) -> Row:
        """See `Examples`."""
        new = {name: words.text for name, words in zip(self.columns, texts, strict=True)}
        return Row(row.position, {**row.record, **new})


class Tagged:
    """Rows with tokens and tags, or a text and spans; entities move with their words."""

    def texts(self, row: Row) -> list[Words]:
        """See `Examples`."""
        record = row.record
        if "tokens" in record:
            return [of_tokens(record["tokens"], record["tags"])]
        ranges = words_of(record["text"])
        tags, _ = tags_of(ranges, [Span(*span) for span in record["spans"]], "")
        return [of_spans(record["text"], [(start, stop) for start, stop in ranges.tolist()], tags)]

    def row(self, row: Row, texts: Sequence[Words]) -> Row:
        """See `Examples`."""
        return Row(row.position, tagged_record(texts[0], raw="text" in row.record))


def tagged_record(words: Words, raw: bool) -> dict[str, Any]:
    """A row of tagged words as `read_tagged` reads it: tokens and tags or, of a raw text, text and spans."""
    if not raw:
        return {"tokens": list(words.words), "tags": list(words.tags)}
    places = words.spans
    spans = [[places[first][0], places[stop - 1][1], kind] for first, stop, kind in words.entities]
    return {"text": words.text, "spans": spans}


def read_tags(config: AugmentConfig) -> TaggedTexts:
    """The texts of an input with tags."""
    return read_tagged(config.input, config.text or LabelledConfig.text, config.label)


def words_in(texts: TaggedTexts) -> Iterator[Words]:
    """Each text with its words and tags."""
    for text, ranges, tags in zip(texts.texts, texts.words, texts.tags, strict=True):
        if texts.raw:
            yield of_spans(text, [(start, stop) for start, stop in ranges.tolist()], tags)
        else:
            yield of_tokens([text[start:stop] for start, stop in ranges.tolist()], tags)


def open_rows(config: AugmentConfig, read: Callable[[int], object] = lambda _: None) -> tuple[Row, Iterator[Row]]:
    """The first row of the input, and all rows.

    Raises:
        UserError: what is wrong with the input.
    """
    path = Path(config.input)
    if config.task == TAGS:
        texts = read_tags(config)
        records = (tagged_record(words, texts.raw) for words in words_in(texts))
        return peek((Row(number, record) for number, record in enumerate(records, 1)), path)
    return peek(read_rows(config.input, None, input_columns(config), read), path)


def input_columns(config: AugmentConfig) -> InputColumns:
    """The columns that are read of a table."""
    reads_label = config.balance or config.keep_by is not None
    label = (("label", config.label),) if reads_label else ()
    usual = USUAL.get(config.task, ("sentence", "text"))
    columns = InputColumns(config.text or "", config.text_pair, "", label, usual)
    columns.check()
    return columns


def examples_of(config: AugmentConfig, first: Mapping[str, Any]) -> Examples:
    """How the rows of an input are texts.

    Args:
        first: the record of the first row, by which the usual column is told.
    """
    if config.task == TAGS:
        return Tagged()
    columns = input_columns(config)
    text = columns.text or next(name for name in columns.usual if name in first)
    require(config.text_pair != text, "text_pair", config.text_pair, "it is text already; name another column")
    return Texts(config.input, (text,) if config.text_pair is None else (text, config.text_pair))
