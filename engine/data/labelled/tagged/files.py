"""Texts with tagged words from CoNLL columns, JSON lines, parquet and `datasets`.

Shapes: W words of a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from engine.config import LabelledConfig
from engine.data.labelled.classes import held_out
from engine.data.labelled.files import DATASETS_PREFIX, damage_as_user_error, format_of, open_records
from engine.data.labelled.tables import Columns, Records, json_records
from engine.data.labelled.tagged.conll import read_conll
from engine.data.labelled.tagged.schemes import OUTSIDE, to_bio, type_of
from engine.data.labelled.tagged.spans import Ranges, read_spans, tags_of, words_of
from engine.data.text.textfile import parse_json, text_lines
from engine.errors import UserError
from engine.lfs import refuse_pointer

JSON_LINES = (".jsonl", ".ndjson", ".json")
#: names of columns that are tried where labelled.text and labelled.label are left as they are
TEXT_COLUMNS = ("tokens", "words", "text")
SPAN_COLUMNS = ("spans", "entities")
LABEL_COLUMNS = ("tags", "ner_tags", *SPAN_COLUMNS, "labels")
#: of the words of a list, which are joined to a text
JOINT = " "
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
#: types that a message lists
SHOWN_TYPES = 10


@dataclass(frozen=True)
class TaggedTexts:
    """Texts with tagged words, in the order of their file; every list has one entry a text."""

    path: str
    texts: list[str]
    """raw, or a sentence's tokens with a space between them"""
    words: list[Ranges]
    """where in the text each word starts and stops, [W, 2]"""
    tags: list[list[str]]
    """of the words, in BIO"""
    lines: list[list[int]]
    """of the words in the file (or the one that all of them have), from 1; rows, in tables without lines"""
    scheme: str
    """what the file's tags are written in: BIO, IOB1, BIOES, BILOU or BMES; "spans" of raw texts"""
    widened: int = 0
    """spans that began or ended inside of a word"""
    types: tuple[str, ...] | None = None
    """of the entities of all texts that these are a part of; None: these are all"""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def raw(self) -> bool:
        """Whether the file has texts and spans of their characters, instead of words and tags."""
        return self.scheme == "spans"

    def place(self, text: int, word: int) -> str:
        """Where a word came from, for a message."""
        return _place(self.path, self.lines[text], word)

    def word(self, text: int, word: int) -> str:
        """A word as it is written."""
        start, stop = self.words[text][word]
        return self.texts[text][start:stop]


@dataclass(frozen=True)
class _Row:
    """A text of a file before its tags are converted."""

    text: str
    words: Ranges
    tags: list[str]
    lines: list[int]
    widened: int | None
    """spans that were widened; None where there are tags instead"""


def read_tagged(path: str, text: str, label: str) -> TaggedTexts:
    """Read texts with tagged words.

    Args:
        path: JSON lines (.jsonl, .ndjson, .json), .parquet, a folder of `Dataset.save_to_disk` or `datasets:...`, whose
            rows are lists of tokens and tags, or raw texts and spans ([start, end, label], or objects); any other name
            is that of a file with CoNLL columns. Files of text also with .gz, .xz or .bz2.
        text, label: columns, see `read_conll` for their numbers. The defaults of labelled.text and labelled.label stand
            for the first of `TEXT_COLUMNS` and of `LABEL_COLUMNS` that are there.

    Raises:
        UserError: nothing there, damaged content, a missing column, rows that are none, tags or spans that can't be.
    """
    with damage_as_user_error(path):
        rows = list(_rows(path, text, label))
    if not rows:
        raise UserError(f"{path}: no texts in it; give a file with at least one")
    raw = rows[0].widened is not None
    for row in rows:
        if (row.widened is not None) != raw:
            kinds = ("a raw text", "a list of tokens")
            here, first = kinds[raw], kinds[not raw]
            raise UserError(f"{_place(path, row.lines)}: {here}, and the first row has {first}; give rows of one kind")
    tags, scheme = [row.tags for row in rows], "spans"
    if not raw:
        scheme, tags = to_bio(tags, lambda index, word: _place(path, rows[index].lines, word))
    texts, words, lines = ([getattr(row, name) for row in rows] for name in ("text", "words", "lines"))
    return TaggedTexts(path, texts, words, tags, lines, scheme, sum(row.widened or 0 for row in rows))


def _place(path: str, lines: Sequence[int], word: int = 0) -> str:
    kind = "row" if path.startswith(DATASETS_PREFIX) or Path(path).is_dir() or format_of(path) == ".parquet" else "line"
    return f"{path}, {kind} {lines[min(word, len(lines) - 1)]}"


def _rows(path: str, text: str, label: str) -> Iterable[_Row]:
    if _is_table(path):
        records, columns, names = _open(path, text, label)
        for position, record in records:
            value, tags, place = record[columns.text], record[columns.label], _place(path, [position])
            if isinstance(value, str):
                yield _of_spans(value, tags, columns, position, place)
            else:
                yield _of_lists(value, tags, names, columns, position, place)
        return
    if not path.strip() or not Path(path).exists():
        raise UserError(f"{path or 'labelled'}: no such file or folder; check the path")
    if format_of(path) == ".csv":
        raise UserError(f"{path}: a csv table has no sentences; give CoNLL columns, .jsonl or .parquet")
    refuse_pointer(Path(path), "labelled")
    for sentence in read_conll(path, text, label):
        joined, words = join_tokens(sentence.words)
        yield _Row(joined, words, sentence.tags, sentence.lines, None)


def _is_table(path: str) -> bool:
    """Whether a path's rows have named columns."""
    known = format_of(path) in (*JSON_LINES, ".parquet")
    return known or path.startswith(DATASETS_PREFIX) or Path(path).is_dir()


def _open(path: str, text: str, label: str) -> tuple[Records, Columns, tuple[str, ...] | None]:
    """The records of a table, the columns that are read of them, and the names of tags that are numbers."""
    available = _available(path)
    labels = _chosen(label, LabelledConfig.label, LABEL_COLUMNS, available)
    # beside spans, tokens are but what an annotation tool made of the text
    usual = TEXT_COLUMNS[::-1] if labels in SPAN_COLUMNS else TEXT_COLUMNS
    columns = Columns(_chosen(text, LabelledConfig.text, usual, available), None, labels)
    columns.check()
    if not path.startswith(DATASETS_PREFIX) and Path(path).is_file() and format_of(path) in JSON_LINES:
        refuse_pointer(Path(path), "labelled")
        return json_records(path, columns, cleaned=False), columns, None
    records, names = open_records(path, columns)
    return records, columns, names


def _available(path: str) -> Sequence[str]:
    """Names of the columns of a table, the usual ones of a data set; none of a file that has no sound row."""
    if path.startswith(DATASETS_PREFIX) or Path(path).is_dir():
        return ("tokens", "ner_tags")
    if not Path(path).is_file():
        return ()
    if format_of(path) == ".parquet":
        names: list[str] = pyarrow.parquet.read_schema(path).names
        return names
    try:
        first = parse_json(next((line for line in text_lines(Path(path)) if line.strip()), "{}"))
    except ValueError:  # whoever reads the rows tells where and why
        return ()
    return list(first) if isinstance(first, dict) else ()


def _chosen(value: str, unset: str, usual: Sequence[str], available: Sequence[str]) -> str:
    """The column that is meant; of a file without any of the usual ones the first of these, which is then missed."""
    if value != unset or value in available:
        return value
    return next((name for name in usual if name in available), usual[0])


def _of_lists(
    value: Any, tags: Any, names: tuple[str, ...] | None, columns: Columns, position: int, place: str
) -> _Row:
    """A row of tokens and tags."""
    for column, given in ((columns.text, value), (columns.label, tags)):
        if not isinstance(given, (list, tuple)):
            raise UserError(f"{place}: column {column!r} holds {given!r:.60}; give tokens and tags as lists")
    if not value:
        raise UserError(f"{place}: no tokens in column {columns.text!r}; fill it in or remove the row")
    if len(value) != len(tags):
        raise UserError(f"{place}: {len(value)} tokens and {len(tags)} tags; give each token one tag")
    for token in value:
        if not isinstance(token, str):
            raise UserError(f"{place}: token {token!r:.60} in column {columns.text!r} is no text; put it in quotes")
    named = [_named(tag, names, columns.label, place) for tag in tags]
    joined, words = join_tokens([_sound(token, place) for token in value])
    return _Row(joined, words, named, [position], None)


def _named(tag: object, names: tuple[str, ...] | None, column: str, place: str) -> str:
    if names is not None and type(tag) is int and 0 <= tag < len(names):
        return names[tag]
    if not isinstance(tag, str):
        remedy = "write the tags' names, such as B-PER" if names is None else f"the file names 0 to {len(names) - 1}"
        raise UserError(f"{place}: tag {tag!r:.60} in column {column!r} is no name; {remedy}")
    return tag.strip()


def _of_spans(text: str, value: object, columns: Columns, position: int, place: str) -> _Row:
    """A row of a raw text and spans of its characters."""
    if not text.strip():
        raise UserError(f"{place}: empty text in column {columns.text!r}; fill it in or remove the row")
    sound = _sound(text, place)
    words = words_of(sound)
    tags, widened = tags_of(words, read_spans(value, sound, columns.label, place), place)
    return _Row(sound, words, tags, [position], widened)


def _sound(text: str, place: str) -> str:
    """A text as it can be encoded: lone surrogates, which JSON can escape, are replaced one by one to keep places."""
    if "\0" in text:
        raise UserError(f"{place}: a text holds a character NUL; remove it")
    return _HALF_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", text)


def join_tokens(tokens: Sequence[str]) -> tuple[str, Ranges]:
    """A text of these tokens, and where they are in it."""
    stops = np.fromiter(accumulate(len(token) + len(JOINT) for token in tokens), np.int64) - len(JOINT)
    lengths = np.fromiter((len(token) for token in tokens), np.int64)
    return JOINT.join(tokens), np.stack([stops - lengths, stops], axis=1)


def types_of(texts: TaggedTexts) -> tuple[str, ...]:
    """The types of the entities of all texts, in alphabetical order."""
    if texts.types is not None:
        return texts.types
    return tuple(sorted({type_of(tag) for tags in texts.tags for tag in tags if tag != OUTSIDE}))


def tag_names(training: TaggedTexts) -> tuple[str, ...]:
    """The tags that a model learns, in the order of their ids: O, then B- and I- of every type.

    Raises:
        UserError: no word is part of an entity.
    """
    types = types_of(training)
    if not types:
        raise UserError(f"{training.path}: every tag is {OUTSIDE}; give texts with entities, or set labelled.label")
    return (OUTSIDE, *(f"{letter}-{kind}" for kind in types for letter in "BI"))


def tags_by_type(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The tags of each type of entities."""
    return {type_of(begin): (begin, inside) for begin, inside in zip(names[1::2], names[2::2], strict=True)}


def tag_ids(texts: TaggedTexts, names: Sequence[str]) -> list[NDArray[np.int64]]:
    """The ids of the words' tags, [W] of each text.

    Raises:
        UserError: a type that is not among `names`.
    """
    ids = {name: number for number, name in enumerate(names)}
    for index, tags in enumerate(texts.tags):
        for word, tag in enumerate(tags):
            if tag not in ids:
                types = list(dict.fromkeys(type_of(name) for name in names[1:]))
                known = ", ".join(types[:SHOWN_TYPES]) + (", ..." if len(types) > SHOWN_TYPES else "")
                raise UserError(
                    f"{texts.place(index, word)}: type {type_of(tag)!r} of {texts.word(index, word)!r:.60} is not "
                    f"among the training examples ({known}); correct it or add training examples of it"
                )
    return [np.array([ids[tag] for tag in tags], dtype=np.int64) for tags in texts.tags]


def split_validation(training: TaggedTexts, labelled: LabelledConfig, seed: int) -> tuple[TaggedTexts, TaggedTexts]:
    """Training texts and those of them that are held out for validation: a tenth, or the fold that is asked for.

    Texts with entities and those without are held out in equal shares.

    Raises:
        UserError: too few texts to hold any out.
    """
    kinds = ["entities" if set(tags) - {OUTSIDE} else "no entities" for tags in training.tags]
    training = replace(training, types=types_of(training))  # a rare type may be in the other part alone
    kept, held = (_select(training, part) for part in held_out(labelled, kinds, seed, "texts"))
    return kept, held


def _select(texts: TaggedTexts, indices: Sequence[int]) -> TaggedTexts:
    names = ("texts", "words", "tags", "lines")
    kept: dict[str, Any] = {name: [getattr(texts, name)[index] for index in indices] for name in names}
    return replace(texts, **kept)
