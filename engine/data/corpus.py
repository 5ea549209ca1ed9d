"""Readers: whatever holds text -> a stream of documents.

A source is a file (plain text, JSON lines, parquet), a folder of such files, a saved or named `datasets`
dataset, or "embedded", the prose of the Python installation. Everything streams: memory is bounded by the
longest document, not by the corpus.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

from engine.data.embedded import embedded_documents
from engine.errors import UserError

log = logging.getLogger(__name__)

SourceKind = Literal["text", "jsonl", "parquet", "saved", "named", "embedded"]

KIND_OF_SUFFIX: dict[str, SourceKind] = {
    "": "text",
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".xz")
SUPPORTED = ".txt, .md, no suffix, .jsonl, .ndjson (each also .gz or .xz) or .parquet"
#: files that describe a folder of data and are no part of it
DESCRIPTIONS = ("README", "LICENSE", "LICENCE", "COPYING", "CHANGELOG")
BATCH_ROWS = 1024


@dataclass(kw_only=True)
class CorpusConfig:
    """Where the text is and how it is cut into documents."""

    source: list[str] = field(default_factory=lambda: ["embedded"])
    """files, folders of files (recursive), saved `datasets` folders, datasets:NAME[:CONFIG], or embedded (the
    documentation that comes with Python: needs no network). Files: .txt, .md, .jsonl, .parquet; .gz and .xz"""
    text_field: str = "text"
    """field or column of the text in JSON lines, parquet and `datasets`"""
    documents: Literal["blank_line", "file"] = "blank_line"
    """plain text only: a document ends at a blank line (BERT's convention), or is a whole file"""
    split: str = "train"
    """split to read of a `datasets` dataset"""


@dataclass(frozen=True)
class Source:
    """One thing that a reader opens."""

    name: str
    kind: SourceKind
    path: Path


@dataclass(frozen=True)
class SourceRecord:
    """What a source held when it was read."""

    name: str
    sha256: str
    bytes: int


@dataclass
class Position:
    """How far reading has come, in bytes of the sources as stored (compressed ones count compressed)."""

    bytes: int = 0


def list_sources(config: CorpusConfig) -> list[Source]:
    """The sources in reading order: as given, folders expanded in sorted order.

    Raises:
        UserError: nothing given, a missing path, an unsupported file, a folder without any supported file.
    """
    if not config.source:
        raise UserError("source: nothing given; give files, folders, datasets:NAME or embedded")
    return [source for name in config.source for source in _expand(name)]


def _expand(name: str) -> list[Source]:
    if name == "embedded":
        return [Source(name, "embedded", Path())]
    if name.startswith("datasets:"):
        return [Source(name, "named", Path())]
    path = Path(name)
    if not path.exists():
        raise UserError(f"source: {name} does not exist; give a file, a folder, datasets:NAME or embedded")
    if path.is_dir():
        return [Source(name, "saved", path)] if _is_saved_dataset(path) else _expand_folder(path)
    kind = _kind(path)
    if kind is None:
        raise UserError(f"source: {name} has an unsupported suffix; give {SUPPORTED}")
    return [Source(name, kind, path)]


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _expand_folder(folder: Path) -> list[Source]:
    sources, skipped = [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if any(part.startswith((".", "_")) for part in path.relative_to(folder).parts):
            continue
        kind = _kind(path)
        if kind is None or path.name.split(".")[0].upper() in DESCRIPTIONS:
            skipped.append(path)
        else:
            sources.append(Source(str(path), kind, path))
    if not sources:
        raise UserError(f"source: folder {folder} has no readable file; give {SUPPORTED}")
    if skipped:
        log.info("%s: skipped %d other files, e.g. %s", folder, len(skipped), skipped[0].name)
    return sources


def _kind(path: Path) -> SourceKind | None:
    stem = Path(path.stem) if path.suffix in COMPRESSED else path
    kind = KIND_OF_SUFFIX.get(stem.suffix)
    return None if kind == "parquet" and stem is not path else kind


def record_source(source: Source, config: CorpusConfig) -> SourceRecord:
    """Hash what the source holds: the bytes of its files, or the text for the embedded corpus."""
    if source.kind == "embedded":
        return _record(source.name, ("\0".join(embedded_documents()).encode(),))
    if source.kind in ("saved", "named"):
        files = [Path(str(entry["filename"])) for entry in _dataset(source, config).cache_files]
        return _record(source.name, (part for path in sorted(files) for part in _blocks_of(path)))
    return _record(source.name, _blocks_of(source.path))


def _record(name: str, parts: Iterable[bytes]) -> SourceRecord:
    digest, size = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        size += len(part)
    return SourceRecord(name, digest.hexdigest(), size)


def _blocks_of(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                yield block
    except OSError as error:
        raise UserError(f"source: {path} can't be read ({error.strerror}); check its permissions") from error


def read_documents(config: CorpusConfig, sources: list[Source], position: Position | None = None) -> Iterator[str]:
    """The documents of all sources in order, without the ones that are only white space.

    Args:
        position: updated while reading, for a progress bar.

    Raises:
        UserError: names the file and, where there is one, the line.
    """
    position = position or Position()
    for source in sources:
        start = position.bytes
        for text in _read(source, config, position):
            if not text.isspace() and text:
                yield text
        position.bytes = max(position.bytes, start + _size(source))


def _size(source: Source) -> int:
    return source.path.stat().st_size if source.path.is_file() else 0


def _read(source: Source, config: CorpusConfig, position: Position) -> Iterator[str]:
    if source.kind == "text":
        return _read_text(source.path, config.documents, position)
    if source.kind == "jsonl":
        return _read_jsonl(source.path, config.text_field, position)
    if source.kind == "parquet":
        return _read_parquet(source.path, config.text_field)
    if source.kind == "embedded":
        return iter(embedded_documents())
    return _read_dataset(source, config)


def _lines(path: Path, position: Position) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a possibly compressed UTF-8 file."""
    number, start = 0, position.bytes
    try:
        with path.open("rb") as raw, _decompressed(raw, path.suffix) as stream:
            for number, line in enumerate(stream, 1):
                position.bytes = start + raw.tell()
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged after line {number} ({error}); get the file again") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check its permissions") from error


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    return cast("IO[bytes]", lzma.LZMAFile(raw)) if suffix == ".xz" else raw


def _read_text(path: Path, documents: str, position: Position) -> Iterator[str]:
    document: list[str] = []
    for _, line in _lines(path, position):
        if documents == "blank_line" and line.isspace():
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _read_jsonl(path: Path, name: str, position: Position) -> Iterator[str]:
    for number, line in _lines(path, position):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); give one JSON object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a JSON {type(row).__name__}, not an object; give one object a line")
        if name not in row:
            raise UserError(f"text_field: {path}:{number} has no field {name!r}; it has {', '.join(row) or 'none'}")
        if not isinstance(row[name], str):
            raise UserError(f"text_field: {name!r} of {path}:{number} is {row[name]!r:.40}, not text; choose another")
        # JSON can escape half of a surrogate pair, which is no character and which UTF-8 can't hold
        yield row[name].encode("utf-8", "ignore").decode() if "\\u" in line else row[name]


def _read_parquet(path: Path, name: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check_column(path, name, {column.name: str(column.type) for column in file.schema_arrow})
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[name]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); get the file again") from error


def check_column(where: object, name: str, types: dict[str, str]) -> None:
    """Raise unless `types` (column -> type) has a text column of this name."""
    if name not in types:
        raise UserError(f"text_field: {where} has no column {name!r}; it has {', '.join(types) or 'none'}")
    if types[name] not in ("string", "large_string"):
        raise UserError(f"text_field: column {name!r} of {where} is {types[name]}, not text; choose another column")


def _read_dataset(source: Source, config: CorpusConfig) -> Iterator[str]:
    dataset = _dataset(source, config)
    types = {name: str(getattr(feature, "dtype", "nested")) for name, feature in dataset.features.items()}
    check_column(source.name, config.text_field, types)
    for batch in dataset.select_columns([config.text_field]).iter(batch_size=BATCH_ROWS):
        yield from (text for text in batch[config.text_field] if text)


def _dataset(source: Source, config: CorpusConfig) -> Any:
    """A `datasets.Dataset`. Not annotated so: jsonargparse would import a second's worth of libraries for the name."""
    import datasets

    try:
        if source.kind == "saved":
            loaded = datasets.load_from_disk(str(source.path))
        else:
            name, _, configuration = source.name.removeprefix("datasets:").partition(":")
            loaded = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"source: {source.name} can't be loaded ({reason}); check its name and the network") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if config.split not in loaded:
        raise UserError(f"split: {source.name} has no split {config.split!r}; it has {', '.join(loaded)}")
    return loaded[config.split]
