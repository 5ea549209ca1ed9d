"""The rows of an input, with all of their columns, one after the other."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from engine.data.labelled.files import FORMATS, damage_as_user_error, format_of
from engine.data.labelled.tables import Columns, Records, json_records, not_utf8, table_records
from engine.data.text.textfile import STANDARD_INPUT, text_lines
from engine.errors import UserError
from engine.lfs import refuse_pointer
from engine.predict.options import STANDARD

PARQUET_ROWS = 1024
#: characters of the rows of a chunk, all columns together, at which it ends though it has fewer rows than it may
CHUNK_CHARACTERS = 4_000_000

#: chunks a process that are read and not yet written
AHEAD = 2

Read = Callable[[int], object]
T = TypeVar("T")


class Row(NamedTuple):
    """A row of the input."""

    position: int
    """line that it starts at (or its number, in files without lines), from 1"""
    record: Mapping[str, Any]
    """its columns"""


@dataclass(frozen=True)
class Chunk:
    """Rows that are computed and written together."""

    rows: list[Row]
    digest: str
    """sha256 of all rows up to the last of these"""


@dataclass(frozen=True)
class InputColumns(Columns):
    """All columns of an input, among them those of the texts, as far as they are named."""

    usual: tuple[str, ...] = ("text",)
    """what the column of the text is called where nobody names it: the first of these that there is"""

    def fields(self) -> dict[str, str]:
        named = (("text", self.text), ("text_pair", self.text_pair), *self.more)
        return {name: column for name, column in named if column}

    def fits(self, available: Sequence[str]) -> bool:
        return super().fits(available) and (bool(self.text) or not set(available).isdisjoint(self.usual))

    def kept(self, available: Sequence[str]) -> Sequence[str]:
        return available

    def require(self, available: Sequence[str], place: str) -> None:
        super().require(available, place)
        if not self.text and set(available).isdisjoint(self.usual):
            have = ", ".join(str(name) for name in available) or "none"
            raise UserError(f"{place}: no column {' or '.join(self.usual)}; it has {have}; set text to one of them")
        if len(set(available)) < len(available):
            twice = next(name for name in available if list(available).count(name) > 1)
            raise UserError(f"{place}: several columns are called {twice!r}; rename all but one")


def input_path(given: str) -> Path:
    """The file of an input."""
    return STANDARD_INPUT if given == STANDARD else Path(given)


def input_format(given: str, wanted: str | None) -> str:
    """The format of an input: csv, tsv, jsonl, parquet or txt.

    Raises:
        UserError: its name doesn't tell.
    """
    suffix = format_of(given)
    if wanted is not None:
        return wanted
    if given == STANDARD:
        return "jsonl"
    if suffix not in (*FORMATS, ".txt"):
        known = ", ".join((*FORMATS, ".txt"))
        raise UserError(f"input: {given!r} has the unknown format {suffix or '(no suffix)'!r}; give {known}, or format")
    return "jsonl" if suffix in (".jsonl", ".ndjson", ".json") else suffix[1:]


def read_rows(given: str, wanted: str | None, columns: InputColumns, read: Read = lambda _: None) -> Iterator[Row]:
    """The rows of a file or, for "-", of the standard input.

    Args:
        wanted: the format, where the name is not to tell it.
        columns: those of the texts; the others come along.
        read: called now and then with the bytes that were read of the file as stored.

    Raises:
        UserError: nothing there, an unknown format, damaged content, a missing column.
    """
    path, kind = input_path(given), input_format(given, wanted)
    if given != STANDARD and not path.is_file():
        what = "a folder; give a file" if path.is_dir() else "no such file; check the path"
        raise UserError(f"input: {given!r} is {what}")
    refuse_pointer(path, "input")
    readers: dict[str, Callable[[], Records]] = {
        "csv": lambda: table_records(str(path), columns, tab=False, read=read),
        "tsv": lambda: table_records(str(path), columns, tab=True, read=read),
        "jsonl": lambda: json_records(str(path), columns, read),
        "txt": lambda: _text_records(path, columns, read),
        "parquet": lambda: _parquet_records(path, columns, read),
    }
    with damage_as_user_error(str(path)):
        for position, record in readers[kind]():
            yield Row(position, record)


def _text_records(path: Path, columns: InputColumns, read: Read) -> Records:
    """A text a line; an empty line is an empty text, so that output and input have the same lines."""
    column, number = columns.text or columns.usual[0], 0
    if columns.text_pair:
        raise UserError(f"{path}: txt holds one text a line and text_pair is {columns.text_pair!r}; give csv or jsonl")
    try:
        for number, line in enumerate(text_lines(path, read), 1):
            yield number, {column: line.rstrip("\r\n")}
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), number + 1, error) from error


def _parquet_records(path: Path, columns: InputColumns, read: Read) -> Records:
    import pyarrow.parquet as pq

    if path == STANDARD_INPUT:
        raise UserError("input: parquet can't be read from a pipe; give the file")
    size = path.stat().st_size
    with pq.ParquetFile(path) as file:
        columns.require(file.schema_arrow.names, str(path))
        count, before = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            yield from enumerate(batch.to_pylist(), before + 1)
            before += len(batch)
            read(size * before // count)


class Chunks:
    """Cuts rows into chunks, and knows the hash of all that it has seen.

    Where a chunk ends depends on the rows before its end alone, so a run that goes on makes the same chunks.
    """

    def __init__(self, rows: Iterator[Row], limit: int) -> None:
        """Args: limit is the number of rows of a chunk."""
        self._rows, self._limit, self._hash = rows, limit, hashlib.sha256()

    def skip(self, count: int) -> str:
        """Pass over `count` rows; the hash of what was there of them."""
        for _ in range(count):
            row = next(self._rows, None)
            if row is None:
                break
            self._add(row)
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Chunk]:
        rows, characters = list[Row](), 0
        for row in self._rows:
            rows.append(row)
            characters += self._add(row)
            if len(rows) == self._limit or characters >= CHUNK_CHARACTERS:
                yield Chunk(rows, self._hash.hexdigest())
                rows, characters = [], 0
        if rows:
            yield Chunk(rows, self._hash.hexdigest())

    def _add(self, row: Row) -> int:
        content = json.dumps(row.record, default=str).encode()
        self._hash.update(content + b"\n")
        return len(content)


def peek(rows: Iterator[Row], path: Path) -> tuple[Row, Iterator[Row]]:
    """The first row, and all rows.

    Raises:
        UserError: there is none.
    """
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: no rows in it; give at least one")
    return first, chain([first], rows)


def in_order(submit: Callable[[Chunk], Future[T]], chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Chunk, T]]:
    """The chunks in their order, each with what was made of it; a bad row comes up after all chunks before it.

    Args:
        submit: begins the work on a chunk, of which `AHEAD` for each of the workers are under way.
    """
    pending: deque[tuple[Chunk, Future[T]]] = deque()
    source, mistake = iter(chunks), None
    try:
        while True:
            try:
                chunk = next(source, None)
            except UserError as error:
                chunk, mistake = None, error
            if chunk is None:
                break
            pending.append((chunk, submit(chunk)))
            if workers == 1 or len(pending) >= AHEAD * workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
        if mistake is not None:
            raise mistake
    finally:
        for _, future in pending:
            future.cancel()
