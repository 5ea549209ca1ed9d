"""CoNLL columns: a token and its tag a line, an empty line after each sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import LabelledConfig
from engine.data.labelled.tables import not_utf8, place
from engine.data.labelled.tagged.schemes import is_tag
from engine.data.text.textfile import text_lines
from engine.errors import UserError

DOCUMENT = "-DOCSTART-"
_COMMENT = "#"
#: not every white space: a token may be a no-break space
_SPACES = re.compile(r"[ \t]+")


@dataclass
class Sentence:
    """Tokens with a tag each."""

    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """of the tokens in the file, from 1"""


def read_conll(path: str, text: str, label: str) -> list[Sentence]:
    """The sentences of a file with columns, which tabs separate where its first row has one, else spaces.

    Lines of documents (-DOCSTART-) end a sentence. A line that begins with # is a comment unless it has as many columns
    as the others and ends in a tag.

    Args:
        text, label: numbers of the columns of tokens and tags, from 1 or, negative, from the end; the defaults of
            labelled.text and labelled.label are the first and the last.

    Raises:
        UserError: no UTF-8, a column that isn't there, a row of fewer or more columns than the first, a character NUL.
    """
    rows = list(_rows(path))
    first = next((line for _, line in rows if line.strip() and not line.startswith((_COMMENT, DOCUMENT))), None)
    if first is None:
        return []
    tabs = "\t" in first
    width = len(_fields(first, tabs))
    columns = _Columns(path, text, label, width)
    sentences = [Sentence()]
    for number, line in rows:
        fields = _fields(line, tabs)
        if not line.strip(" \t") or line.startswith(DOCUMENT):
            if sentences[-1].words:
                sentences.append(Sentence())
        elif len(fields) == width and not (line.startswith(_COMMENT) and not is_tag(fields[columns.tag])):
            columns.add(fields, number, sentences[-1])
        elif not line.startswith(_COMMENT):
            raise UserError(
                f"{place(path, number)}: {_counted(len(fields))}, and the first row has {width}; give each line "
                f"a token and its tag, separated by {'a tab' if tabs else 'spaces'} as there"
            )
    return sentences if sentences[-1].words else sentences[:-1]


def _rows(path: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without their ends."""
    number = 0
    try:
        for number, line in enumerate(text_lines(Path(path)), 1):
            if "\0" in line:
                raise UserError(f"{place(path, number)}: it holds a character NUL; the file is damaged, make it again")
            yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path, number + 1, error) from error


def _fields(line: str, tabs: bool) -> list[str]:
    if tabs:
        return line.rstrip(" \t").split("\t")
    return _SPACES.split(line.strip(" \t"))


class _Columns:
    """Which columns of a file hold tokens and tags."""

    def __init__(self, path: str, text: str, label: str, width: int) -> None:
        self.path = path
        if width < 2:
            raise UserError(f"{path}: its first row has 1 column; give each line a token and its tag")
        self.token = self._place(text, LabelledConfig.text, 0, width, "labelled.text")
        self.tag = self._place(label, LabelledConfig.label, width - 1, width, "labelled.label")
        if self.token == self.tag:
            raise UserError(f"labelled.label: column {self.tag + 1} of {path} is that of the tokens; give another")

    def _place(self, value: str, unset: str, default: int, width: int, option: str) -> int:
        if value == unset:
            return default
        try:
            number = int(value)
        except ValueError:
            number = 0
        if not 1 <= abs(number) <= width:
            raise UserError(
                f"{option}: {value!r} is not allowed; {self.path} has columns 1 to {width}, or -1 for the last"
            )
        return number - 1 if number > 0 else width + number

    def add(self, fields: list[str], number: int, sentence: Sentence) -> None:
        """Append a row."""
        token, tag = fields[self.token], fields[self.tag].strip()
        if not token:
            raise UserError(f"{place(self.path, number)}: no token in column {self.token + 1}; fill it in")
        sentence.words.append(token)
        sentence.tags.append(tag)
        sentence.lines.append(number)


def _counted(columns: int) -> str:
    return f"{columns} column{'' if columns == 1 else 's'}"
