"""What a line of text is, told from its lines: real books and articles in all layouts."""

from __future__ import annotations

import json
import lzma
import re
import textwrap
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from engine.data.text.layout import judge, measure
from engine.data.text.sentences import Lines, split_sentences

Change = Callable[[list[str]], str]


def paragraphs(text: str) -> list[str]:
    return [part.replace("\n", " ") for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(parts: list[str]) -> list[str]:
    return [re.sub(r"\s+", " ", sentence) for part in parts for sentence in split_sentences(part)]


LAYOUTS: dict[str, tuple[Change, Lines]] = {
    **{
        f"wrapped at {width}": (
            lambda parts, width=width: "\n\n".join(textwrap.fill(part, width) for part in parts),
            "wrapped",
        )
        for width in (45, 72, 100)
    },
    "wrapped with carriage returns": (
        lambda parts: "\n\n".join(textwrap.fill(part, 72) for part in parts).replace("\n", "\r\n"),
        "wrapped",
    ),
    "a sentence a line": (lambda parts: "\n".join(sentences(parts)), "sentence"),
    "a sentence a line, a blank line a paragraph": (
        lambda parts: "\n\n".join("\n".join(sentences([part])) for part in parts),
        "sentence",
    ),
    "a sentence a line without punctuation": (
        lambda parts: "\n".join(re.sub(r"[^\w\s]", "", part).lower() for part in sentences(parts)),
        "sentence",
    ),
    "a paragraph a line": ("\n".join, "paragraph"),
    "headings over paragraphs": (lambda parts: "\n".join(f"A Heading\n{part}" for part in parts), "paragraph"),
}


@pytest.fixture(scope="module", params=["books_en", "wiki_en"])
def texts(request: pytest.FixtureRequest, shared_data: Path) -> list[str]:
    name: str = request.param
    with lzma.open(shared_data / name / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"][:20_000] for line in islice(file, 20)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_real_text_is_told_in_every_layout(texts: list[str], name: str) -> None:
    change, expected = LAYOUTS[name]
    assert judge(measure([change(paragraphs(text)) for text in texts], "en")) == expected


SMALL: dict[str, tuple[str, Lines]] = {
    "short notes": ("asked about delivery\noffered a refund\naccepted it\n\nscreen is broken\nasked why\n", "sentence"),
    "short sentences": ("The cat sat.\nIt ran.\n\nA dog came.\nIt slept.\n", "sentence"),
    "long sentences of one length": ("The cat sat on the mat beside the wide blue river.\n" * 9, "sentence"),
    "questions and quotes": ('"Who is it?"\n"It is me!"\n(He laughed.)\nThen they left.\n', "sentence"),
    "notes of which some stop": ("seen at noon\nno fever.\ntook two pills\nsleeps well\ncalled home.\n", "sentence"),
    "Chinese sentences": ("今天天气很好。\n我们去公园散步。\n你也来吗？\n", "sentence"),
    "Hindi sentences": ("यह एक घर है।\nवह वहाँ रहता है।\n", "sentence"),
    "one wrapped sentence": (
        "A sentence that is far too long for the width\nof a page goes on in the next line.\n",
        "wrapped",
    ),
    "narrow": ("Dr. Smith went\nhome. He slept\nuntil it was\nlight. Then he\nrose.\n", "wrapped"),
    "Chinese, wrapped": ("今天天气很好，我们去公园散步。你也来吗？" * 40, "wrapped"),
    "verse": ("Shall I compare thee\nTo a summer day,\nThou art more lovely,\nAnd more temperate:\n", "wrapped"),
    "no line break": ("One. Two.\n\nThree. Four.\n", "wrapped"),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_few_lines_are_told_too(name: str) -> None:
    text, expected = SMALL[name]
    if name == "Chinese, wrapped":
        text = "\n".join(textwrap.wrap(text, 41))
    assert judge(measure([text], "en")) == expected


def test_sentences_by_what_lines_are() -> None:
    text = "Dr. Smith left. He\r\nslept.\n\nEnd"
    assert split_sentences(text, lines="wrapped") == ["Dr. Smith left.", "He\nslept.", "End"]
    assert split_sentences(text, lines="paragraph") == ["Dr. Smith left.", "He", "slept.", "End"]
    assert split_sentences(text, lines="sentence") == ["Dr. Smith left. He", "slept.", "End"]
