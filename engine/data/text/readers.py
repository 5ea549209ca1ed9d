"""Readers of one source each: plain text, WikiExtractor's files, JSON lines, parquet, `datasets`.

Each yields the texts of the documents in order. A row without text yields an empty text, which the caller counts.
"""

from __future__ import annotations

import gzip
import html
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.text.textfile import json_remedy, parse_json, text_lines, without_half_characters
from engine.errors import UserError
from engine.lfs import refuse_pointer

BATCH_ROWS = 1024
#: what WikiExtractor (https://github.com/attardi/wikiextractor) writes before each article
WIKI_OPENING = re.compile(r'<doc id=".*">\s*$')
_WIKI_CLOSING = "</doc>"
_TEXT_TYPES = ("string", "large_string", "string_view")


@dataclass
class Position:
    """How far reading has come."""

    bytes: int = 0
    """bytes read of the sources as stored: of compressed files, compressed bytes"""
    documents: Counter[str] = field(default_factory=Counter)
    """documents of each source that was read to its end"""
    without_text: Counter[str] = field(default_factory=Counter)
    """rows that hold no text, of each source that was read to its end"""


def numbered_lines(path: Path, position: Position) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a possibly compressed UTF-8 file.

    Raises:
        UserError: names the file and, where there is one, the line.
    """
    number, start = 0, position.bytes

    def advance(stored: int) -> None:
        position.bytes = start + stored

    try:
        for number, line in enumerate(text_lines(path, advance), 1):
            yield number, line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number + 1}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged after line {number} ({error}); get the file again") from error
    except OSError as error:
        if error.strerror is None:  # bz2 raises an OSError without a number
            raise UserError(f"{path}: damaged after line {number} ({error}); get the file again") from error
        raise UserError(f"{path}: can't be read ({error.strerror}); check its permissions") from error


def read_text(path: Path, documents: str, position: Position) -> Iterator[str]:
    """Plain text: a document ends at a blank line, or with the file."""
    document: list[str] = []
    for _, line in numbered_lines(path, position):
        if documents == "blank_line" and line.isspace():
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def read_wiki(path: Path, position: Position) -> Iterator[str]:
    """What WikiExtractor writes: each <doc ...> ... </doc> is a document; it escapes <, > and & in their text."""
    document: list[str] = []
    for _, line in numbered_lines(path, position):
        if (line.startswith("<doc ") and WIKI_OPENING.match(line)) or line.rstrip() == _WIKI_CLOSING:
            yield "".join(document)
            document = []
        else:
            document.append(html.unescape(line) if "&" in line else line)
    yield "".join(document)


def read_jsonl(path: Path, name: str, position: Position) -> Iterator[str]:
    """The field `name` of each line; null, and the NaN that pandas writes for it, are rows without text."""
    for number, line in numbered_lines(path, position):
        if line.isspace():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); {json_remedy(line)}") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UserError(f"{path}:{number}: a JSON {kind}, not an object; {json_remedy(line)}")
        if name not in row:
            raise UserError(f"text_field: {path}:{number} has no field {name!r}; it has {', '.join(row) or 'none'}")
        text = row[name]
        if text is None or text != text:
            yield ""
        elif not isinstance(text, str):
            raise UserError(f"text_field: {name!r} of {path}:{number} is {text!r:.40}, not text; choose another")
        else:
            yield without_half_characters(text) if "\\u" in line else text


def read_parquet(path: Path, name: str) -> Iterator[str]:
    """The column `name`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_column(path, name, {column.name: str(column.type) for column in file.schema_arrow})
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[name]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); get the file again") from error


def read_dataset(dataset: Any, source: str, name: str) -> Iterator[str]:
    """The column `name` of a `datasets.Dataset`."""
    types = {column: str(getattr(feature, "dtype", "nested")) for column, feature in dataset.features.items()}
    _check_column(source, name, types)
    for batch in dataset.select_columns([name]).iter(batch_size=BATCH_ROWS):
        yield from (text or "" for text in batch[name])


def _check_column(where: object, name: str, types: dict[str, str]) -> None:
    """Raise unless `types` (column -> type) has a text column of this name."""
    if name not in types:
        raise UserError(f"text_field: {where} has no column {name!r}; it has {', '.join(types) or 'none'}")
    values = types[name].removeprefix("dictionary<values=").split(",")[0]  # what pandas writes for a category
    if values not in _TEXT_TYPES:
        raise UserError(f"text_field: column {name!r} of {where} is {types[name]}, not text; choose another column")


def open_dataset(name: str, folder: Path | None, split: str) -> Any:
    """Open a `datasets.Dataset`. It is not annotated as one: to resolve the name jsonargparse would import the library.

    Args:
        name: name of the source; `datasets:NAME[:CONFIG]` unless it is in a `folder` of `save_to_disk`.
        folder: a folder of `Dataset.save_to_disk`; None for a named data set.
        split: the split to open.
    """
    import datasets

    for file in sorted(folder.rglob("*.arrow")) if folder else ():
        refuse_pointer(file, "source")
    try:
        if folder:
            loaded = datasets.load_from_disk(str(folder))
        else:
            named, _, configuration = name.removeprefix("datasets:").partition(":")
            loaded = datasets.load_dataset(named, configuration or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"source: {name} can't be loaded ({reason}); check its name and the network") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise UserError(f"split: {name} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]
