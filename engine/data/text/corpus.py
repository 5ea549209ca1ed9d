"""Sources of text of any kind -> a stream of documents.

A source is a file (plain text, JSON lines, parquet), a folder of such files, a saved or named `datasets`
dataset, or "embedded", the prose of the Python installation. Everything streams: memory is bounded by the
longest document, not by the corpus.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from engine.data.text.embedded import embedded_documents
from engine.data.text.readers import (
    WIKI_OPENING,
    Position,
    numbered_lines,
    open_dataset,
    read_dataset,
    read_jsonl,
    read_parquet,
    read_text,
    read_wiki,
)
from engine.data.text.sentences import Lines
from engine.data.text.textfile import COMPRESSIONS, parse_json
from engine.errors import UserError
from engine.lfs import refuse_pointer

log = logging.getLogger(__name__)

SourceKind = Literal["text", "wiki", "jsonl", "parquet", "saved", "named", "embedded"]
Documents = Literal["blank_line", "file"]

KIND_OF_SUFFIX: dict[str, SourceKind] = {
    "": "text",
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
#: suffixes that don't tell what a file holds
TOLD_BY_CONTENT = ("", ".txt", ".json")
SUPPORTED = ".txt, .md, no suffix, .jsonl, .ndjson, .json with a line an object (each also .gz, .xz, .bz2) or .parquet"
#: files that describe a folder of data and are no part of it
DESCRIPTIONS = ("README", "LICENSE", "LICENCE", "COPYING", "CHANGELOG")
#: So many plain-text files are notes, articles or books, one per file: corpora with blank lines between documents come
#: in a few large files. Hardly any book is longer than a megabyte.
MANY_FILES = 20
BOOK_BYTES = 1_000_000


@dataclass(kw_only=True)
class CorpusConfig:
    """Where the text is and how it is cut into documents."""

    source: list[str] = field(default_factory=lambda: ["embedded"])
    """files, folders of files (recursive), saved `datasets` folders, datasets:NAME[:CONFIG], or embedded (the
    documentation that comes with Python: needs no network). Files: .txt, .md, .jsonl, .parquet; .gz, .xz and .bz2"""
    text_field: str = "text"
    """field or column of the text in JSON lines, parquet and `datasets`"""
    documents: Literal["auto", "blank_line", "file"] = "auto"
    """plain text only: a document ends at a blank line (BERT's convention), or is a whole file; auto takes the file
    where a folder has at least 20 files of mostly at most 1 MB, and the blank line elsewhere"""
    lines: Literal["auto", "sentence", "paragraph", "wrapped"] = "auto"
    """what a line of the text is: one sentence (BERT's convention), a paragraph of whole sentences, or as much as
    fits a page, with sentences that go on in the next line; auto tells by the first text of each source"""
    split: str = "train"
    """split to read of a `datasets` dataset"""


@dataclass(frozen=True)
class Source:
    """What a reader opens: a file, a dataset or the embedded corpus."""

    name: str
    kind: SourceKind
    path: Path
    given: str
    """the entry of `CorpusConfig.source` that it belongs to"""
    by_content: bool = False
    """whether the kind was told from the content, not from the name"""
    documents: Documents = "blank_line"
    lines: Lines = "wrapped"

    @property
    def folder(self) -> str:
        """The folder that was given, if it was one."""
        return "" if self.given == self.name else self.given


@dataclass(frozen=True)
class SourceRecord:
    """What a source held when it was read."""

    name: str
    sha256: str
    bytes: int


def list_sources(config: CorpusConfig) -> list[Source]:
    """The sources in reading order: as given, folders expanded in sorted order.

    Raises:
        UserError: nothing given, a missing path, an unsupported file, a folder without any supported file.
    """
    if not config.source:
        raise UserError("source: nothing given; give files, folders, datasets:NAME or embedded")
    sources = [source for name in config.source for source in _expand(name, config.text_field)]
    for source in sources:
        refuse_pointer(source.path, "source")
    return _with_documents(sources, config.documents)


def _expand(name: str, text_field: str) -> list[Source]:
    if name == "embedded":
        return [Source(name, "embedded", Path(), name)]
    if name.startswith("datasets:"):
        return [Source(name, "named", Path(), name)]
    path = Path(name)
    if not path.exists():
        raise UserError(f"source: {name} does not exist; give a file, a folder, datasets:NAME or embedded")
    if path.is_dir():
        return [Source(name, "saved", path, name)] if _is_saved_dataset(path) else _expand_folder(path, text_field)
    kind = _kind(path)
    if kind is None:
        raise UserError(f"source: {name} has an unsupported suffix; give {SUPPORTED}")
    return [_recognised(Source(name, kind, path, name), text_field)]


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _expand_folder(folder: Path, text_field: str) -> list[Source]:
    sources, skipped = [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if any(part.startswith((".", "_")) for part in path.relative_to(folder).parts):
            continue
        kind = _kind(path)
        if kind is None or path.name.split(".")[0].upper() in DESCRIPTIONS:
            skipped.append(path)
            continue
        source = _recognised(Source(str(path), kind, path, str(folder)), text_field)
        # A .json file in a folder may describe the data instead of being part of it.
        if _suffix(path) == ".json" and not source.by_content:
            skipped.append(path)
        else:
            sources.append(source)
    if not sources:
        example = f"; {skipped[0]} is none" if skipped else ""
        raise UserError(f"source: folder {folder} has no readable file{example}; give {SUPPORTED}")
    if skipped:
        log.info("%s: skipped %d other files, e.g. %s", folder, len(skipped), skipped[0].name)
    return sources


def _kind(path: Path) -> SourceKind | None:
    kind = KIND_OF_SUFFIX.get(_suffix(path))
    return None if kind == "parquet" and path.suffix.lower() in COMPRESSIONS else kind


def _suffix(path: Path) -> str:
    """The suffix before that of compression, in lower case."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def _recognised(source: Source, text_field: str) -> Source:
    """The source with the kind that its first line tells, where its suffix tells none."""
    if _suffix(source.path) not in TOLD_BY_CONTENT:
        return source
    try:
        first = next((line for _, line in numbered_lines(source.path, Position()) if not line.isspace()), "")
    except UserError:  # told, with its line, when the file is read
        return source
    if WIKI_OPENING.match(first):
        return replace(source, kind="wiki", by_content=True)
    fields = _json_fields(first)
    if text_field in fields:
        return replace(source, kind="jsonl", by_content=True)
    if fields and source.kind == "text":
        named = ", ".join(fields)
        log.warning("%s is read as plain text though it begins with JSON: text_field may be %s", source.name, named)
    return source


def _json_fields(line: str) -> list[str]:
    """Names in a line that is a JSON object; none for any other."""
    if not line.lstrip().startswith("{"):
        return []
    try:
        return list(parse_json(line))
    except ValueError:
        return []


def _with_documents(sources: list[Source], documents: str) -> list[Source]:
    """The sources with the rule for documents of plain text; files that were given one by one count as one folder."""
    sizes: dict[str, list[int]] = {}
    for source in sources:
        if source.kind == "text":
            sizes.setdefault(source.folder, []).append(source.path.stat().st_size)

    def rule(source: Source) -> Documents:
        if documents != "auto":
            return "file" if documents == "file" else "blank_line"
        siblings = sizes.get(source.folder, [])
        return "file" if len(siblings) >= MANY_FILES and median(siblings) <= BOOK_BYTES else "blank_line"

    return [replace(source, documents=rule(source)) for source in sources]


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


def read_documents(config: CorpusConfig, sources: Sequence[Source], position: Position | None = None) -> Iterator[str]:
    """The documents of all sources in order, without the ones that are only white space.

    Args:
        position: updated while reading, for a progress bar.

    Raises:
        UserError: names the file and, where there is one, the line.
    """
    position = position or Position()
    for source in sources:
        start, count, empty = position.bytes, 0, 0
        for text in _read(source, config, position):
            if text and not text.isspace():
                count += 1
                yield text
            else:
                empty += 1
        position.bytes = max(position.bytes, start + stored_bytes([source]))
        position.documents[source.name] += count
        if source.kind not in ("text", "wiki"):  # in plain text, two blank lines make an empty document
            position.without_text[source.name] += empty


def stored_bytes(sources: Iterable[Source]) -> int:
    """Size of those sources that are files."""
    return sum(source.path.stat().st_size for source in sources if source.path.is_file())


def _read(source: Source, config: CorpusConfig, position: Position) -> Iterator[str]:
    if source.kind == "text":
        return read_text(source.path, source.documents, position)
    if source.kind == "wiki":
        return read_wiki(source.path, position)
    if source.kind == "jsonl":
        return read_jsonl(source.path, config.text_field, position)
    if source.kind == "parquet":
        return read_parquet(source.path, config.text_field)
    if source.kind == "embedded":
        return iter(embedded_documents())
    return read_dataset(_dataset(source, config), source.name, config.text_field)


def _dataset(source: Source, config: CorpusConfig) -> Any:
    return open_dataset(source.name, source.path if source.kind == "saved" else None, config.split)
