"""Readers of labelled text files: csv, tsv, JSON lines.

Each yields (position, record) pairs, where a position is the line that a record starts at.
"""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from engine.data.text.textfile import json_remedy, parse_json, text_lines, without_half_characters
from engine.errors import UserError

log = logging.getLogger(__name__)

Records = Iterator[tuple[int, Mapping[str, Any]]]

#: separators of fields that are recognised in .csv and .tsv files, and their names in messages
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read."""

    text: str
    text_pair: str | None
    label: str
    more: tuple[tuple[str, str], ...] = ()
    """further fields and the column of each"""

    def fields(self) -> dict[str, str]:
        """Column name of each configuration field that is set."""
        named = {"labelled.text": self.text, "labelled.text_pair": self.text_pair, "labelled.label": self.label}
        named |= dict(self.more)
        return {field: column for field, column in named.items() if column}

    def check(self) -> None:
        """Raise a `UserError` if two fields name the same column."""
        seen: dict[str, str] = {}
        for field, column in self.fields().items():
            if column in seen:
                raise UserError(f"{field}: {column!r} is {seen[column]} already; name another column")
            seen[column] = field

    def require(self, available: Sequence[str], place: str) -> None:
        """Raise a `UserError` that names the first column that `available` lacks or has more than once."""
        for field, column in self.fields().items():
            if column not in available:
                have = ", ".join(str(name) for name in available) or "none"
                raise UserError(f"{place}: no column {column!r}; it has {have}; set {field} to one of them")
            if (count := list(available).count(column)) > 1:
                raise UserError(f"{place}: {count} columns are called {column!r} ({field}); rename all but one")

    def fits(self, available: Sequence[str]) -> bool:
        """Whether a header has them all, by which the separator of a table is told."""
        return set(self.fields().values()) <= set(available)

    def kept(self, available: Sequence[str]) -> Sequence[str]:
        """Those of a record's columns that are read."""
        return tuple(self.fields().values())


def columns_in(value: str) -> tuple[str, ...]:
    """The columns that a field names: one, or several between commas; quotes keep a comma in a name.

    >>> columns_in('a, b,"c, d"')
    ('a', 'b', 'c, d')
    """
    return tuple(name.strip() for name in next(csv.reader([value], skipinitialspace=True), []) if name.strip())


def of_field(field: str, columns: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs for `Columns.more` of the columns that one field names; a message tells which of them it is about."""
    return tuple((f"{field}[{index}]" if index else field, column) for index, column in enumerate(columns))


def place(path: str, line: int) -> str:
    """The file and line of a record, for a message."""
    return f"{path}, line {line}"


def table_records(path: str, columns: Columns, tab: bool, read: Callable[[int], object] = lambda _: None) -> Records:
    """The rows of a csv or (`tab`) tsv file with a header; the separator is found from the header.

    In a .tsv a quote is a plain character, as in GLUE's files, unless all names of its header are quoted.

    Args:
        read: see `text_lines`.
    """
    csv.field_size_limit(sys.maxsize)  # the module's own limit is 131,072 characters
    start, last = 1, 0

    def count(stored: int) -> None:
        nonlocal last
        last += 1
        read(stored)

    lines = text_lines(Path(path), count)
    try:
        header = next(lines, "")
        reader = csv.reader(chain([header], lines), strict=True, **_format_of(path, header, columns, tab))
        names = [name.strip() for name in next(reader, [])]
        columns.require(names, path)
        used = {column: names.index(column) for column in columns.kept(names)}
        start = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(names):
                raise UserError(
                    f"{place(path, start)}: the header has {len(names)} fields and this row has {len(row)}; "
                    "check its separators and quotes"
                )
            if row:
                yield start, {column: row[index] for column, index in used.items()}
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{place(path, start)}: {error}; check the quotes of this row") from error
    except UnicodeDecodeError as error:
        raise not_utf8(path, last, error) from error


def _format_of(path: str, header: str, columns: Columns, tab: bool) -> dict[str, Any]:
    """Arguments of `csv.reader`, with the separator by which the header has the wanted names."""
    own = "\t" if tab else ","
    for separator in (own, *_SEPARATORS):
        quoted = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
        if columns.fits(quoted):
            if separator != own:
                log.info("%s: its fields are separated by %s", path, _SEPARATORS[separator])
            plain = tab and separator == "\t" and not _is_quoted(header)
            return {"delimiter": separator, "quoting": csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL}
    return {"delimiter": own, "quoting": csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL}


def _is_quoted(header: str) -> bool:
    names = header.strip("\r\n").split("\t")
    return all(len(name) > 1 and name[0] == name[-1] == '"' for name in names)


def json_records(
    path: str, columns: Columns, read: Callable[[int], object] = lambda _: None, cleaned: bool = True
) -> Records:
    """The objects of JSON lines; empty lines are skipped.

    Args:
        read: see `text_lines`.
        cleaned: without lone surrogates in their texts; offsets into a text need it as it is.
    """
    number = 0
    try:
        for number, line in enumerate(text_lines(Path(path), read), 1):
            if line.strip():
                yield number, _json_record(line, columns, place(path, number), cleaned)
    except UnicodeDecodeError as error:
        raise not_utf8(path, number + 1, error) from error


def _json_record(line: str, columns: Columns, where: str, cleaned: bool) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); {json_remedy(line)}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: {line.strip()!r:.60} is no object; {json_remedy(line)}")
    wanted = columns.fields().values()
    several = any(line.count(json.dumps(column, ensure_ascii=False)) > 1 for column in wanted)
    columns.require(_names(line) if several else list(record), where)
    if cleaned and "\\u" in line:
        return {name: _whole(record[name]) for name in columns.kept(list(record))}
    return record


def _whole(value: Any) -> Any:
    """A text, or the texts of a list, without halves of characters."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return without_half_characters(value) if isinstance(value, str) else value


def _names(line: str) -> list[str]:
    """The names in a JSON object, repeated ones as often as they are there."""
    names: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        names[:] = [name for name, _ in pairs]  # the outermost object is the last to end

    json.loads(line, object_pairs_hook=keep)
    return names


def not_utf8(path: str, line: int, error: UnicodeDecodeError) -> UserError:
    """What to say of a line that is not UTF-8."""
    byte = error.object[error.start]
    return UserError(f"{place(path, line)}: not UTF-8 text (byte 0x{byte:02x}: {error.reason}); convert it to UTF-8")
