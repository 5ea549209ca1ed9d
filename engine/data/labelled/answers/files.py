"""Questions with answers in a text, from SQuAD's JSON (1.1 and 2.0) and from JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.labelled.files import damage_as_user_error, format_of
from engine.data.labelled.tables import not_utf8, place
from engine.data.text.textfile import json_remedy, parse_json, text_lines
from engine.errors import UserError
from engine.lfs import refuse_pointer

FORMATS = (".json", ".jsonl", ".ndjson")
#: what JSON can escape and no text can hold; one replacement each keeps the offsets of answers
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
#: characters of a text that a message shows
SHOWN = 60

#: a record and where it stands in its file
Placed = tuple[str, Any]


@dataclass(frozen=True)
class Answer:
    """A piece of a context, as its file has it."""

    text: str
    start: int
    """characters of the context before it"""

    @property
    def span(self) -> tuple[int, int]:
        """Where it starts and stops in the context, without white space at its ends."""
        begin = self.start + len(self.text) - len(self.text.lstrip())
        return begin, begin + len(self.text.strip())


@dataclass(frozen=True)
class Question:
    """A question about a context."""

    id: str
    text: str
    context: str
    answers: tuple[Answer, ...]
    """the first is learned, all count as right; none where the context holds no answer"""
    place: str
    """file and place in it, for a message"""


def read_questions(path: str) -> list[Question]:
    """Read questions in the order of their file.

    Args:
        path: SQuAD's JSON (`{"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}`), or JSON lines with id
            (optional: the line's number), question, context and answers, which are `{"text": [...], "answer_start":
            [...]}` or a list of `{"text": ..., "answer_start": ...}`; each also with .gz, .xz or .bz2. No answers, or
            `"is_impossible": true`, is a question that the context doesn't answer.

    Raises:
        UserError: nothing there, an unknown format, damaged content, a missing or empty part, a repeated id, or an
            answer that is not where the file says.
    """
    if not path.strip() or not Path(path).exists():
        raise UserError(f"{path or 'labelled'}: no such file; check the path")
    if (suffix := format_of(path)) not in FORMATS:
        raise UserError(f"{path}: unknown format {suffix or '(no suffix)'!r}; give one of {', '.join(FORMATS)}")
    refuse_pointer(Path(path), "labelled")
    with damage_as_user_error(path):
        records = list(_records(path, _lines(path)))
    questions = [_question(record, where) for where, record in records]
    if not questions:
        raise UserError(f"{path}: no questions in it; give a file with at least one")
    _refuse_repeated(questions)
    return questions


def _lines(path: str) -> list[str]:
    lines: list[str] = []
    try:
        lines.extend(text_lines(Path(path)))
    except UnicodeDecodeError as error:
        raise not_utf8(path, len(lines) + 1, error) from error
    return lines


def _records(path: str, lines: list[str]) -> Iterator[Placed]:
    """The questions of a file, each as a mapping with its context."""
    whole = _whole(path, lines)
    if whole is not None:
        yield from _official(path, whole)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = place(path, number)
            record = _parsed(line, where)
            yield where, {"id": str(number), **_object(record, where, json_remedy(line))}


def _whole(path: str, lines: list[str]) -> Mapping[str, Any] | None:
    """The content of a file in SQuAD's layout; None of JSON lines."""
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return None
    try:
        value = parse_json(first)
    except ValueError:
        if format_of(path) != ".json":
            return None
        text = "".join(lines)
        try:  # over several lines
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{place(path, error.lineno)}: not JSON ({error.msg}); correct it") from error
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}: not JSON (nested too deeply, or a number too long); correct it") from error
        if not isinstance(value, dict) or "data" not in value:
            remedy = "write one object a line: jq -c '.[]' FILE"
            raise UserError(
                f"{path}: neither SQuAD's layout, an object with 'data', nor JSON lines; {remedy}"
            ) from None
    return value if isinstance(value, dict) and "data" in value and "question" not in value else None


def _parsed(line: str, where: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); {json_remedy(line)}") from error


def _official(path: str, whole: Mapping[str, Any]) -> Iterator[Placed]:
    """The questions of SQuAD's layout, placed by article, paragraph and question, which count from 0."""
    for article, entry in _listed(whole, "data", path):
        for paragraph, part in _listed(entry, "paragraphs", f"{path}, {article}"):
            above = f"{article}.{paragraph}"
            for number, record in _listed(part, "qas", f"{path}, {above}"):
                where = f"{path}, {above}.{number}"
                if "id" not in _object(record, where):
                    raise _missing("id", record, where)
                yield where, {**record, **{key: part[key] for key in ("context",) if key in part}}


def _listed(holder: Any, key: str, where: str) -> Iterator[tuple[str, Any]]:
    """The entries of a list, and what each is called in a message."""
    entries = _get(_object(holder, where), key, where)
    if not isinstance(entries, list):
        raise UserError(f"{where}: {key!r} is {_shown(entries)}, which is no list; write SQuAD's layout")
    return ((f"{key}[{index}]", entry) for index, entry in enumerate(entries))


def _object(value: Any, where: str, remedy: str = "write SQuAD's layout") -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {_shown(value)} is no object; {remedy}")
    return value


def _get(record: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise _missing(key, record, where)
    return record[key]


def _missing(key: str, record: Mapping[str, Any], where: str) -> UserError:
    have = ", ".join(map(str, record)) or "nothing"
    return UserError(f"{where}: no {key!r}; it has {have}; add it")


def _question(record: Mapping[str, Any], where: str) -> Question:
    context, text = (_text(_get(record, key, where), key, where) for key in ("context", "question"))
    answers = _answers(record, context, where)
    impossible = record.get("is_impossible")
    if impossible not in (None, True, False):
        raise UserError(f"{where}: is_impossible is {_shown(impossible)}; write true or false")
    if impossible is not None and bool(impossible) == bool(answers):
        told = "true and there are answers" if impossible else "false and there is no answer"
        raise UserError(f"{where}: is_impossible is {told}; correct one of them")
    return Question(_identity(record["id"], where), text, context, answers, where)


def _identity(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise UserError(f"{where}: id {_shown(value)}; an id is a text or a whole number")
    return str(value)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {_shown(value)}, which is no text; correct it")
    if not value.strip():
        raise UserError(f"{where}: empty {key!r}; fill it in or remove the question")
    return _HALF_CHARACTER.sub("\ufffd", value)


def _answers(record: Mapping[str, Any], context: str, where: str) -> tuple[Answer, ...]:
    given = _get(record, "answers", where)
    if isinstance(given, dict):
        texts, starts = (_get(given, key, f"{where}, answers") for key in ("text", "answer_start"))
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise UserError(f"{where}: text and answer_start of answers are no lists of the same length; correct them")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(given, list):
        entries = [_object(entry, f"{where}, answers", "give text and answer_start") for entry in given]
        pairs = [(_get(entry, "text", where), _get(entry, "answer_start", where)) for entry in entries]
    else:
        raise UserError(
            f"{where}: answers is {_shown(given)}; give lists of text and answer_start, empty ones where there is none"
        )
    return tuple(_answer(text, start, context, where) for text, start in pairs)


def _answer(text: Any, start: Any, context: str, where: str) -> Answer:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: answer {_shown(text)} is no text; of a question without answer give an empty list")
    if isinstance(start, bool) or not isinstance(start, int):
        raise UserError(f"{where}: answer_start is {_shown(start)}; give a whole number of characters")
    if not 0 <= start <= len(context) - len(text):
        raise UserError(
            f"{where}: answer {_shown(text)} at {start} is not within the context of {len(context):,} characters; "
            "correct answer_start"
        )
    text = _HALF_CHARACTER.sub("\ufffd", text)
    if not context.startswith(text, start):
        found = context.find(text)
        told = "the context doesn't hold it" if found < 0 else f"it stands at {found}"
        raise UserError(
            f"{where}: answer {_shown(text)} is not at {start}, where the context has "
            f"{_shown(context[start : start + len(text)])}; {told}: correct answer_start, in characters from 0"
        )
    return Answer(text, start)


def _refuse_repeated(questions: list[Question]) -> None:
    seen: dict[str, str] = {}
    for question in questions:
        if question.id in seen:
            raise UserError(
                f"{question.place}: id {question.id!r} is that of {seen[question.id]} too; give each its own"
            )
        seen[question.id] = question.place


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."
