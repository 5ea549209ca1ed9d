"""Files of questions: SQuAD's layouts and JSON lines, and one line for each kind of mistake in them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.labelled.answers.files import Answer, Question, read_questions
from engine.errors import UserError

CONTEXT = "Denver won. It was the  Broncos' third title."
ROW = {
    "id": "a",
    "question": "Who won?",
    "context": CONTEXT,
    "answers": {"text": ["Denver", "Broncos"], "answer_start": [0, 24]},
}


def official(*qas: dict[str, Any]) -> dict[str, Any]:
    return {"version": "v2.0", "data": [{"title": "x", "paragraphs": [{"context": CONTEXT, "qas": list(qas)}]}]}


def written(path: Path, content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return str(path)


QA = {"id": "a", "question": "Who won?", "answers": [{"text": "Denver", "answer_start": 0}]}
NONE = {"id": "b", "question": "Who lost?", "answers": [], "is_impossible": True, "plausible_answers": []}


@pytest.mark.parametrize("indent", [None, 1])
def test_squads_layout(tmp_path: Path, indent: int | None) -> None:
    path = written(tmp_path / "dev.json", json.dumps(official(QA, NONE), indent=indent))
    first, second = read_questions(path)
    assert first == Question("a", "Who won?", CONTEXT, (Answer("Denver", 0),), f"{path}, {QAS}[0]")
    assert (second.id, second.answers) == ("b", ())


QAS = "data[0].paragraphs[0].qas"


def test_json_lines_with_both_kinds_of_answers_and_without_ids(tmp_path: Path) -> None:
    listed = {**ROW, "answers": [{"text": "Broncos", "answer_start": 24}]}
    none = {**ROW, "answers": {"text": [], "answer_start": []}}
    rows = [ROW, *({key: value for key, value in row.items() if key != "id"} for row in (listed, none))]
    path = written(tmp_path / "rows.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    questions = read_questions(path)
    assert [question.id for question in questions] == ["a", "3", "5"]
    assert [[answer.text for answer in question.answers] for question in questions] == [
        ["Denver", "Broncos"],
        ["Broncos"],
        [],
    ]
    assert questions[1].place == f"{path}, line 3"


def test_json_lines_may_be_called_json_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress((json.dumps(ROW) + "\n").encode()))
    assert read_questions(str(tmp_path / "rows.json.gz"))[0].id == "a"


def test_a_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n")
    assert read_questions(str(tmp_path / "rows.jsonl"))[0].context == CONTEXT


def test_half_characters_keep_the_offsets(tmp_path: Path) -> None:
    row = {**ROW, "context": "x \ud83d Denver", "answers": {"text": ["Denver"], "answer_start": [4]}}
    (question,) = read_questions(written(tmp_path / "rows.jsonl", json.dumps(row)))
    assert question.context == "x \ufffd Denver"
    assert question.answers[0].span == (4, 10)


def test_white_space_around_an_answer_is_not_of_its_span(tmp_path: Path) -> None:
    row = {**ROW, "answers": {"text": ["  Broncos"], "answer_start": [22]}}
    (question,) = read_questions(written(tmp_path / "rows.jsonl", json.dumps(row)))
    assert question.answers[0].span == (24, 31)


def changed(**values: Any) -> str:
    return json.dumps({key: value for key, value in {**ROW, **values}.items() if value is not ...})


MISTAKES: dict[str, tuple[str, str]] = {
    "not at its offset": (
        changed(answers={"text": ["Denver"], "answer_start": [1]}),
        "PATH, line 1: answer 'Denver' is not at 1, where the context has 'enver '; it stands at 0: correct",
    ),
    "not in its context": (
        changed(answers={"text": ["Boston"], "answer_start": [1]}),
        "PATH, line 1: answer 'Boston' is not at 1, where the context has 'enver '; the context doesn't hold it",
    ),
    "offset beyond the text": (
        changed(answers={"text": ["title."], "answer_start": [41]}),
        "PATH, line 1: answer 'title.' at 41 is not within the context of 45 characters",
    ),
    "negative offset": (
        changed(answers={"text": ["Denver"], "answer_start": [-1]}),
        "PATH, line 1: answer 'Denver' at -1",
    ),
    "offset as text": (
        changed(answers={"text": ["Denver"], "answer_start": ["0"]}),
        "PATH, line 1: answer_start is '0'; give a whole number",
    ),
    "offset as a truth value": (
        changed(answers=[{"text": "Denver", "answer_start": False}]),
        "PATH, line 1: answer_start is False; give a whole number",
    ),
    "empty answer": (
        changed(answers={"text": [""], "answer_start": [0]}),
        "PATH, line 1: answer '' is no text; of a question without answer give an empty list",
    ),
    "answers of another number": (
        changed(answers={"text": ["Denver"], "answer_start": []}),
        "PATH, line 1: text and answer_start of answers are no lists of the same length",
    ),
    "answers as text": (
        changed(answers="Denver"),
        "PATH, line 1: answers is 'Denver'; give lists of text and answer_start",
    ),
    "no offset": (changed(answers=[{"text": "Denver"}]), "PATH, line 1: no 'answer_start'; it has text; add it"),
    "empty context": (changed(context=" \n"), "PATH, line 1: empty 'context'; fill it in or remove the question"),
    "empty question": (changed(question=""), "PATH, line 1: empty 'question'"),
    "question that is no text": (changed(question=["Who?"]), "PATH, line 1: 'question' is ['Who?'], which is no text"),
    "missing key": (changed(context=...), "PATH, line 1: no 'context'; it has id, question, answers; add it"),
    "missing answers": (changed(answers=...), "PATH, line 1: no 'answers'; it has id, question, context; add it"),
    "repeated id": (f"{changed()}\n{changed()}", "PATH, line 2: id 'a' is that of PATH, line 1 too; give each its own"),
    "id that is none": (changed(id=1.5), "PATH, line 1: id 1.5; an id is a text or a whole number"),
    "impossible with answers": (
        changed(is_impossible=True),
        "PATH, line 1: is_impossible is true and there are answers",
    ),
    "possible without": (
        changed(is_impossible=False, answers=[]),
        "PATH, line 1: is_impossible is false and there is no answer",
    ),
    "impossible as text": (changed(is_impossible="no"), "PATH, line 1: is_impossible is 'no'; write true or false"),
    "not JSON": (f"{changed()}\n{{'id': 1}}", "PATH, line 2: not JSON ("),
    "list": (
        json.dumps([ROW]),
        "PATH, line 1: [{'id': 'a', 'question': 'Who won?', 'context': \"Denver ... is no object",
    ),
    "nothing": ("\n\n", "PATH: no questions in it; give a file with at least one"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_json_lines_is_one_line(name: str, tmp_path: Path) -> None:
    content, message = MISTAKES[name]
    path = written(tmp_path / "rows.jsonl", content)
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(message.replace("PATH", path))
    assert "\n" not in str(caught.value)


OFFICIAL: dict[str, tuple[Any, str]] = {
    "no id": (official({key: QA[key] for key in ("question", "answers")}), f"PATH, {QAS}[0]: no 'id'; it has question"),
    "no questions": (
        {"data": [{"paragraphs": [{"context": "x"}]}]},
        "PATH, data[0].paragraphs[0]: no 'qas'; it has con",
    ),
    "data that is no list": ({"data": {"a": 1}}, "PATH: 'data' is {'a': 1}, which is no list; write SQuAD's layout"),
    "paragraph that is no object": ({"data": [{"paragraphs": ["x"]}]}, "PATH, data[0].paragraphs[0]: 'x' is no object"),
    "no context": ({"data": [{"paragraphs": [{"qas": [QA]}]}]}, f"PATH, {QAS}[0]: no 'context'; it has id, question"),
    "wrong offset": (
        official(NONE, {**QA, "answers": [{"text": "won", "answer_start": 8}]}),
        f"PATH, {QAS}[1]: answer 'won' is not at 8, where the context has 'on.'; it stands at 7",
    ),
    "empty": ({"data": []}, "PATH: no questions in it"),
    "another object": ('{\n"questions": []\n}', "PATH: neither SQuAD's layout, an object with 'data', nor JSON lines"),
    "broken": ('{\n"data": [}\n', "PATH, line 2: not JSON ("),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_mistake_in_squads_layout_is_one_line(name: str, tmp_path: Path) -> None:
    content, message = OFFICIAL[name]
    path = written(tmp_path / "dev.json", content)
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(message.replace("PATH", path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,question\n")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"id": "caf\xe9"}\n')
    (tmp_path / "wide.jsonl").write_bytes(json.dumps(ROW).encode("utf-16"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 100)[:-10])
    for name, message in {
        "none.json": "no such file",
        "rows.csv": "unknown format '.csv'; give one of .json, .jsonl, .ndjson",
        "latin.jsonl": ", line 2: not UTF-8 text (byte 0xe9",
        "wide.jsonl": "UTF-16, not UTF-8",
        "cut.jsonl.gz": "damaged or not of the format",
    }.items():
        with pytest.raises(UserError) as caught:
            read_questions(str(tmp_path / name))
        assert message in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path / name))
