"""Labelled examples from csv, tsv, jsonl and parquet files and `datasets`."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from engine.data.labelled.tables import Columns, Records, json_records, place, table_records
from engine.data.text.textfile import COMPRESSIONS
from engine.errors import UserError
from engine.lfs import refuse_pointer

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
DATASETS_PREFIX = "datasets:"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_WHOLE = re.compile(r"-?\d+\.0")


@dataclass(frozen=True)
class Examples:
    """Labelled texts in the order of their file; every list has one entry per example."""

    path: str
    texts: list[str]
    pairs: list[str] | None
    """second texts; None for single-text tasks"""
    labels: list[str]
    """name of each example's class; whole numbers are written without a point, so 1, 1.0 and "1" agree"""
    positions: list[int]
    """line that each example starts at (or its row, in tables without lines), from 1"""
    names: tuple[str, ...] | None = None
    """classes in the order that the data set declares (a `datasets` ClassLabel); None where it declares none"""

    def __len__(self) -> int:
        return len(self.labels)

    def place(self, index: int) -> str:
        """Where example `index` came from, for a message."""
        return _place(self.path, self.positions[index])


def read_examples(path: str, text: str, text_pair: str | None, label: str) -> Examples:
    """Read labelled examples.

    Args:
        path: a file (.csv, .tsv, .jsonl, .ndjson, .json or .parquet; the text formats also with .gz, .xz or .bz2), a
            folder written by `Dataset.save_to_disk`, or `datasets:<name or folder>[:<configuration>]:<split>`.
            See `labelled_tables.table_records` for what separates and quotes fields.
        text, text_pair, label: column names.

    Raises:
        UserError: nothing there, an unknown format, damaged content, a missing column, text or label, no rows.
    """
    columns = Columns(text, text_pair, label)
    return read_with(path, columns, lambda record, where, names: label_of(record[label], label, where, names))


def read_with(
    path: str, columns: Columns, label_of: Callable[[Mapping[str, Any], str, tuple[str, ...] | None], str]
) -> Examples:
    """Read examples whose label is told by more than one value, or by another kind of value.

    Args:
        path: see `read_examples`.
        columns: those to read.
        label_of: makes the label of a record, given its place for a message and the classes that the file declares.

    Raises:
        UserError: as `read_examples`.
    """
    columns.check()
    texts, pairs, labels, positions = [], [], [], []
    with damage_as_user_error(path):
        records, names = open_records(path, columns)
        for position, record in records:
            where = _place(path, position)
            texts.append(text_of(record[columns.text], columns.text, where))
            if columns.text_pair:
                pairs.append(text_of(record[columns.text_pair], columns.text_pair, where))
            labels.append(label_of(record, where, names))
            positions.append(position)
    if not labels:
        raise UserError(f"{path}: no examples in it; give a file with at least one row")
    return Examples(path, texts, pairs if columns.text_pair else None, labels, positions, names)


def text_of(value: object, column: str, where: str) -> str:
    """A text as it is.

    Raises:
        UserError: it is missing, blank or no text.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # pandas writes null as NaN
        raise UserError(f"{where}: empty text in column {column!r}; fill it in or remove the row")
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} holds {value!r:.60}, which is not text; name a column of text")
    return value


def label_of(value: object, column: str, where: str, names: tuple[str, ...] | None) -> str:
    """The class name of a label value.

    Raises:
        UserError: it is missing, or neither a string nor a number.
    """
    if names is not None and isinstance(value, int):
        # datasets marks examples without a label by -1
        value = names[value] if 0 <= value < len(names) else None
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
        raise UserError(f"{where}: no label in column {column!r}; fill it in or remove the row")
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: label {value!r:.60} in column {column!r}; a label is a string or a number")
    name = str(value).strip()
    if _CONTROL.search(name):
        raise UserError(f"{where}: label {name!r:.60} in column {column!r} has a control character; correct it")
    return name[:-2] if _WHOLE.fullmatch(name) else name


def _place(path: str, position: int) -> str:
    return place(path, position) if _is_text_format(path) else f"{path}, row {position}"


def _is_text_format(path: str) -> bool:
    return not path.startswith(DATASETS_PREFIX) and format_of(path) in FORMATS[:-1]


def format_of(path: str) -> str:
    """Suffix of the file without that of its compression, in lower case."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def damage_as_user_error(path: str) -> Iterator[None]:
    """Raise a `UserError` for a file that is damaged or can't be read."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: damaged or not of the format that its name says ({error}); make it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def open_records(path: str, columns: Columns) -> tuple[Records, tuple[str, ...] | None]:
    """The records of `path` and the class names that it declares."""
    if path.startswith(DATASETS_PREFIX):
        name, *rest = path.removeprefix(DATASETS_PREFIX).split(":")
        configuration = rest[0] if len(rest) == 2 else None
        if not name or len(rest) > 2:
            raise UserError(f"{path}: not a data set's name; write datasets:<name>[:<configuration>]:<split>")
        return _dataset_records(path, name, configuration, rest[-1] if rest else None, columns)
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    if not path.strip():
        raise UserError(f"labelled: {path!r} names no file; give one, or null for none")
    refuse_pointer(Path(path), "labelled")
    if Path(path).is_dir():
        return _dataset_records(path, path, None, None, columns)
    suffix = format_of(path)
    if suffix == ".parquet":
        return _parquet_records(path, columns)
    if suffix in (".csv", ".tsv"):
        return table_records(path, columns, tab=suffix == ".tsv"), None
    if suffix in FORMATS:
        return json_records(path, columns), None
    raise UserError(f"{path}: unknown format {suffix or '(no suffix)'!r}; give one of {', '.join(FORMATS)}")


def _parquet_records(path: str, columns: Columns) -> tuple[Records, tuple[str, ...] | None]:
    schema = pyarrow.parquet.read_schema(path)
    columns.require(schema.names, path)
    # read_table would take folders called name=value for columns
    table = pyarrow.parquet.ParquetFile(path).read(columns=sorted(columns.kept(schema.names)))
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    feature = features.get(columns.label, {})
    names = feature.get("names") or (feature.get("feature") or {}).get("names")  # of a class, or of a list of them
    return enumerate(table.to_pylist(), 1), tuple(names) if names else None


def _dataset_records(
    path: str, name: str, configuration: str | None, split: str | None, columns: Columns
) -> tuple[Records, tuple[str, ...] | None]:
    # importing datasets takes over a second, which users of plain files need not wait for
    import datasets

    saved = any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    if path == name and not saved:
        raise UserError(f"{path}: no saved data set in this folder; give a file or a folder of Dataset.save_to_disk")
    for file in sorted(Path(name).rglob("*.arrow")) if saved else ():
        refuse_pointer(file, "labelled")
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, configuration)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: datasets cannot load it ({error}); check the name") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise UserError(f"{path}: choose a split ({', '.join(loaded)}): datasets:{name}:<split>")
        loaded = loaded[split]
    columns.require(loaded.column_names, path)
    feature = loaded.features.get(columns.label)
    names = getattr(getattr(feature, "feature", feature), "names", None)
    rows = loaded.select_columns(sorted(columns.kept(loaded.column_names))).to_list()
    return enumerate(rows, 1), tuple(names) if names else None
