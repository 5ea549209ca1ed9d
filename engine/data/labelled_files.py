"""Readers of labelled examples: csv, tsv, jsonl and parquet files and `datasets`, as `Examples`.

Every reader yields (position, record) pairs, so that a message can point at the line or row that is wrong.
"""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from engine.errors import UserError

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSIONS = (".gz", ".xz")
DATASETS_PREFIX = "datasets:"

Records = Iterator[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class Examples:
    """Labelled texts in the order of their file; every list has one entry an example."""

    path: str
    texts: list[str]
    pairs: list[str] | None
    """second texts; None for single-text tasks"""
    labels: list[str]
    """name of each example's class; whole numbers are written without a point, so 1, 1.0 and "1" agree"""
    positions: list[int]
    """line (or row, for tables without lines) of each example, from 1"""
    names: tuple[str, ...] | None = None
    """classes in the order that the data set declares (a `datasets` ClassLabel); None where it declares none"""

    def __len__(self) -> int:
        return len(self.labels)

    def place(self, index: int) -> str:
        """Where example `index` came from, for a message."""
        return _place(self.path, self.positions[index])


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read."""

    text: str
    text_pair: str | None
    label: str

    def fields(self) -> dict[str, str]:
        """Column name of each configuration field that is set."""
        named = {"labelled.text": self.text, "labelled.text_pair": self.text_pair, "labelled.label": self.label}
        return {field: column for field, column in named.items() if column}

    def require(self, available: Sequence[str], place: str) -> None:
        """Raise a `UserError` that names the first column that `available` lacks."""
        for field, column in self.fields().items():
            if column not in available:
                have = ", ".join(str(name) for name in available) or "none"
                raise UserError(f"{place}: no column {column!r}; it has {have}; set {field} to one of them")


def read_examples(path: str, text: str, text_pair: str | None, label: str) -> Examples:
    """Read labelled examples.

    Args:
        path: a file (.csv, .tsv, .jsonl, .ndjson, .json or .parquet; the text formats also with .gz or .xz), a
            folder written by `Dataset.save_to_disk`, or `datasets:<name or folder>[:<configuration>]:<split>`.
            In a .tsv a quote is a plain character, as in GLUE's files.
        text, text_pair, label: column names.

    Raises:
        UserError: nothing there, an unknown format, damaged content, a missing column, text or label, no rows.
    """
    columns = Columns(text, text_pair, label)
    with _damage_as_user_error(path):
        records, names = _open_records(path, columns)
        examples = _collect(path, records, columns, names)
    if not len(examples):
        raise UserError(f"{path}: no examples in it; give a file with at least one row")
    return examples


def _collect(path: str, records: Records, columns: Columns, names: tuple[str, ...] | None) -> Examples:
    texts, pairs, labels, positions = [], [], [], []
    for position, record in records:
        place = _place(path, position)
        texts.append(_text(record[columns.text], columns.text, place))
        if columns.text_pair:
            pairs.append(_text(record[columns.text_pair], columns.text_pair, place))
        labels.append(_label(record[columns.label], columns.label, place, names))
        positions.append(position)
    return Examples(path, texts, pairs if columns.text_pair else None, labels, positions, names)


def _text(value: object, column: str, place: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{place}: empty text in column {column!r}; fill it in or remove the row")
    if not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} holds {value!r:.60}, which is not text; name a column of text")
    return value


def _label(value: object, column: str, place: str, names: tuple[str, ...] | None) -> str:
    """The class name of a label value."""
    if names is not None and isinstance(value, int):
        # datasets marks examples without a label by -1
        value = names[value] if 0 <= value < len(names) else None
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
        raise UserError(f"{place}: no label in column {column!r}; fill it in or remove the row")
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{place}: label {value!r:.60} in column {column!r}; a label is a string or a number")
    return str(value).strip()


def _place(path: str, position: int) -> str:
    unit = "line" if _is_text_format(path) else "row"
    return f"{path}, {unit} {position}"


def _is_text_format(path: str) -> bool:
    return not path.startswith(DATASETS_PREFIX) and _format(path) in FORMATS[:-1]


def _format(path: str) -> str:
    """Suffix of the file without that of its compression, in lower case."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def _damage_as_user_error(path: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path}: not UTF-8 text (byte 0x{byte:02x}: {error.reason}); convert it to UTF-8") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: damaged or not of the format that its name says ({error}); make it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _open_records(path: str, columns: Columns) -> tuple[Records, tuple[str, ...] | None]:
    """The records of `path` and the class names that it declares."""
    if path.startswith(DATASETS_PREFIX):
        name, *rest = path.removeprefix(DATASETS_PREFIX).split(":")
        configuration = rest[0] if len(rest) == 2 else None
        if not name or len(rest) > 2:
            raise UserError(f"{path}: not a data set's name; write datasets:<name>[:<configuration>]:<split>")
        return _dataset_records(path, name, configuration, rest[-1] if rest else None, columns)
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    if Path(path).is_dir():
        return _dataset_records(path, path, None, None, columns)
    suffix = _format(path)
    if suffix == ".parquet":
        return _parquet_records(path, columns)
    if suffix in (".csv", ".tsv"):
        return _table_records(path, columns, tab=suffix == ".tsv"), None
    if suffix in FORMATS:
        return _json_records(path, columns), None
    raise UserError(f"{path}: unknown format {suffix or '(no suffix)'!r}; give one of {', '.join(FORMATS)}")


def _open_text(path: str) -> IO[str]:
    # utf-8-sig: spreadsheets write a byte order mark, which would stick to the first column's name
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    if path.lower().endswith(".xz"):
        return lzma.open(path, "rt", encoding="utf-8-sig", newline="")
    return Path(path).open(encoding="utf-8-sig", newline="")


def _table_records(path: str, columns: Columns, tab: bool) -> Records:
    with _open_text(path) as file:
        if tab:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(file, strict=True)
        try:
            columns.require(reader.fieldnames or (), path)
            for record in reader:
                if None in record or None in record.values():
                    expected = len(reader.fieldnames or ())
                    raise UserError(
                        f"{_place(path, reader.line_num)}: the header has {expected} fields and this row has not; "
                        "check its separators and quotes"
                    )
                yield reader.line_num, record
        except csv.Error as error:
            raise UserError(f"{_place(path, reader.line_num)}: {error}; check the quotes") from error


def _json_records(path: str, columns: Columns) -> Records:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{_place(path, number)}: not JSON ({error}); write one object a line") from error
            if not isinstance(record, dict):
                raise UserError(f"{_place(path, number)}: {line.strip()!r:.60} is no object; write one object a line")
            columns.require(list(record), _place(path, number))
            yield number, record


def _parquet_records(path: str, columns: Columns) -> tuple[Records, tuple[str, ...] | None]:
    schema = pyarrow.parquet.read_schema(path)
    columns.require(schema.names, path)
    table = pyarrow.parquet.read_table(path, columns=sorted(set(columns.fields().values())))
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(columns.label, {}).get("names")
    return enumerate(table.to_pylist(), 1), tuple(names) if names else None


def _dataset_records(
    path: str, name: str, configuration: str | None, split: str | None, columns: Columns
) -> tuple[Records, tuple[str, ...] | None]:
    # importing datasets takes over a second, which users of plain files need not wait for
    import datasets

    saved = any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    if path == name and not saved:
        raise UserError(f"{path}: no saved data set in this folder; give a file or a folder of Dataset.save_to_disk")
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, configuration)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: datasets cannot load it ({error}); check the name") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise UserError(f"{path}: choose a split ({', '.join(loaded)}): datasets:{name}:<split>")
        loaded = loaded[split]
    columns.require(loaded.column_names, path)
    names = getattr(loaded.features[columns.label], "names", None)
    rows = loaded.select_columns(sorted(set(columns.fields().values()))).to_list()
    return enumerate(rows, 1), tuple(names) if names else None
