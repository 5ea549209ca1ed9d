"""What the content of a corpus's sources tells of their format: in words, and as settings of the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from engine.data.text.corpus import MANY_FILES, CorpusConfig, Source, read_documents
from engine.data.text.layout import judge, measure
from engine.data.text.readers import Position
from engine.data.text.sentences import Lines

#: characters and files of each part of the corpus that are read to tell what its lines are
SURVEYED_CHARACTERS = 300_000
SURVEYED_FILES = 32

_LINES: dict[Lines, str] = {
    "sentence": "a line is a sentence",
    "paragraph": "a line is a paragraph, or another run of whole sentences",
    "wrapped": "sentences go on over line breaks",
}
_DOCUMENTS = {
    "file": "a file each (--documents blank_line splits them)",
    "blank_line": "split at blank lines (--documents file takes whole files)",
    "wiki": "split at <doc> tags",
}


def with_lines(sources: Sequence[Source], config: CorpusConfig, language: str) -> tuple[list[Source], list[str]]:
    """The sources with what their lines are, and in words what was found.

    Raises:
        UserError: unreadable text.
    """
    if config.lines != "auto":
        return [replace(source, lines=config.lines) for source in sources], []
    rules: dict[Source, Lines] = {}
    said = []
    for name, members in _parts(sources).items():
        layout = measure(_sample(members, config), language)
        lines = judge(layout)
        rules.update((source, lines) for source in members)
        if layout is not None:
            others = " or ".join(other for other in _LINES if other != lines)
            said.append(f"{name}: {_LINES[lines]}, by their looks (lines: {lines}; if not so give --lines {others})")
    return [replace(source, lines=rules[source]) for source in sources], said


def _parts(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """Sources that are judged and reported as one: many files of one kind in a folder; others are a part each."""
    groups: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        groups.setdefault((source.folder, source.kind), []).append(source)
    parts = {}
    for (folder, kind), members in groups.items():
        if len(members) < MANY_FILES:
            parts.update({source.name: [source] for source in members})
        else:
            several = sum(folder == other for other, _ in groups) > 1
            parts[(folder or members[0].name + ", ...") + (f" ({kind})" if several else "")] = members
    return parts


def _sample(sources: Sequence[Source], config: CorpusConfig) -> Iterator[str]:
    """The beginnings of evenly chosen sources."""
    chosen = sources[:: -(-len(sources) // SURVEYED_FILES)]
    for source in chosen:
        left = SURVEYED_CHARACTERS // len(chosen)
        for text in read_documents(config, [source]):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def describe_sources(sources: Sequence[Source], config: CorpusConfig) -> list[str]:
    """Lines that tell what sources were taken for, where that is not plain from their names."""
    said = []
    for kind, words in {"wiki": "WikiExtractor's, each <doc> a document", "jsonl": "JSON lines"}.items():
        if count := sum(source.kind == kind and source.by_content for source in sources):
            said.append(f"{_files(count)} told by the content: {words}")
    texts = Counter(source.documents for source in sources if source.kind == "text")
    if config.documents == "auto" and texts["file"]:
        said.append(f"{_files(texts['file'])} of plain text: a document each (--documents blank_line splits them)")
    if config.documents != "auto" and not texts:
        said.append(f"documents: {config.documents} changes nothing, for no source is plain text")
    return said


def describe_reading(sources: Sequence[Source], position: Position) -> list[str]:
    """Lines about the documents of plain text and the rows left out, of sources that were read to their ends."""
    said = []
    for name, members in _parts(sources).items():
        names = {source.name for source in members}
        documents, empty = (
            sum(counts[name] for name in names) for counts in (position.documents, position.without_text)
        )
        if members[0].kind in ("text", "wiki"):
            how = "wiki" if members[0].kind == "wiki" else members[0].documents
            said.append(f"{name}: {_files(len(members))}, {documents:,} documents: {_DOCUMENTS[how]}")
        if empty:
            said.append(f"{name}: {empty:,} {'row' if empty == 1 else 'rows'} without text left out")
    return said


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def resolved(sources: Sequence[Source], config: CorpusConfig) -> dict[str, Any]:
    """What `auto` and the content decided, as settings of the store.

    A rule is one value where all sources agree, else [value, number of sources] for each run of equal ones.
    """
    texts = [source.documents for source in sources if source.kind == "text"]
    unused = "blank_line" if config.documents == "auto" else config.documents
    return {
        "documents": _runs(texts) if texts else unused,
        "lines": _runs([source.lines for source in sources]),
        "by_content": sorted({source.kind for source in sources if source.by_content}),
    }


def _runs(values: Sequence[str]) -> str | list[list[Any]]:
    runs = [[value, len(list(run))] for value, run in groupby(values)]
    return values[0] if len(runs) == 1 else runs
