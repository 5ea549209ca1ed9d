"""Rows with their new columns as bytes: JSON lines, csv or tsv."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.data.labelled.tables import place
from engine.errors import UserError
from engine.predict.options import STANDARD
from engine.predict.rows import Row

FORMATS = (".jsonl", ".csv", ".tsv")


class Lines(ABC):
    """A format. Rows are those of one input, whose columns come first and unchanged."""

    def head(self) -> bytes:
        """What the file begins with."""
        return b""

    @abstractmethod
    def lines(self, rows: Sequence[Row], columns: Sequence[Mapping[str, Any]]) -> bytes:
        """Some rows, each with its new columns.

        Raises:
            UserError: a row that the format can't hold.
        """


class JsonLines(Lines):
    """An object a line. What JSON lacks (dates of parquet) is text."""

    def lines(self, rows: Sequence[Row], columns: Sequence[Mapping[str, Any]]) -> bytes:
        return b"".join(_json({**row.record, **new}) + b"\n" for row, new in zip(rows, columns, strict=True))


def _json(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half a character, which JSON can only escape
        return json.dumps(value, default=str).encode()


class Table(Lines):
    """A header and a row a line; lists and objects are JSON, and of an object among the new columns each key is one.

    A .tsv has no quotes, as GLUE's files.
    """

    def __init__(self, path: str, names: Sequence[str], new: Mapping[str, Sequence[str]], tab: bool) -> None:
        """Args: names are the input's columns, new the added ones, each with its keys if it holds objects."""
        self._path, self._names, self._new, self._tab = path, tuple(names), new, tab

    def head(self) -> bytes:
        added = [f"{name}.{key}" if key else name for name, key in self._cells()]
        return self._written([[*self._names, *added]], [0])

    def _cells(self) -> Iterator[tuple[str, str]]:
        """Each new column and, of one that is an object, each of its keys."""
        for name, keys in self._new.items():
            yield from ((name, key) for key in keys or ("",))

    def lines(self, rows: Sequence[Row], columns: Sequence[Mapping[str, Any]]) -> bytes:
        for row, new in zip(rows, columns, strict=True):
            self._refuse_others(row, new)
        cells = [
            [*(row.record[name] for name in self._names), *(new[n][k] if k else new.get(n) for n, k in self._cells())]
            for row, new in zip(rows, columns, strict=True)
        ]
        return self._written(cells, [row.position for row in rows])

    def _refuse_others(self, row: Row, new: Mapping[str, Any]) -> None:
        """A table has the columns of its first row."""
        odd = sorted((row.record.keys() ^ set(self._names)) | (new.keys() - self._new.keys()))
        if odd:
            where = place(self._path, row.position)
            raise UserError(f"{where}: column {odd[0]!r} is not in all rows, as a table needs; write .jsonl")

    def _written(self, rows: Sequence[Sequence[Any]], positions: Sequence[int]) -> bytes:
        texts = [[_cell(value) for value in row] for row in rows]
        if not self._tab:
            written = io.StringIO()
            csv.writer(written, lineterminator="\n").writerows(texts)
            return written.getvalue().encode("utf-8", "ignore")
        for row, position in zip(texts, positions, strict=True):
            if any(mark in cell for cell in row for mark in "\t\n\r"):
                where = place(self._path, position)
                raise UserError(f"{where}: a tab or a line break, which .tsv can't hold; write .csv or .jsonl")
        return "".join("\t".join(row) + "\n" for row in texts).encode("utf-8", "ignore")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def suffix_of(output: str) -> str:
    """The format of an output.

    Raises:
        UserError: its name doesn't tell.
    """
    suffix = ".jsonl" if output == STANDARD else Path(output).suffix.lower()
    if suffix not in FORMATS:
        given = suffix or "(no suffix)"
        raise UserError(f"output: {output!r} has the unknown format {given!r}; give one of {', '.join(FORMATS)}")
    return suffix


def lines_of(output: str, path: str, names: Sequence[str], new: Mapping[str, Sequence[str]]) -> Lines:
    """The format that an output's name tells.

    Args:
        path: of the input, for messages.
        names, new: see `Table`.

    Raises:
        UserError: a new column has the name of one of the input's.
    """
    taken = [name for name in new if name in names]
    if taken:
        raise UserError(f"prefix: the input has a column {taken[0]!r} already; give another prefix of the new columns")
    suffix = suffix_of(output)
    return JsonLines() if suffix == ".jsonl" else Table(path, names, new, tab=suffix == ".tsv")
