"""Schemes of tags: what they are recognised as, what they become, and what is refused."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.labelled.tagged import schemes
from engine.data.labelled.tagged.schemes import SCHEMES, is_tag, to_bio
from engine.errors import UserError


def convert(*texts: str) -> tuple[str, list[str]]:
    name, tags = to_bio([text.split() for text in texts], lambda text, word: f"file, line {10 * text + word}")
    return name, [" ".join(row) for row in tags]


@pytest.mark.parametrize(
    ("texts", "scheme", "bio"),
    [
        (["B-PER I-PER O B-LOC"], "BIO", ["B-PER I-PER O B-LOC"]),
        (["B-PER B-PER I-PER"], "BIO", ["B-PER B-PER I-PER"]),
        (["O O"], "BIO", ["O O"]),
        (["I-PER I-PER O I-LOC B-LOC I-LOC I-PER"], "IOB1", ["B-PER I-PER O B-LOC B-LOC I-LOC B-PER"]),
        (["I-PER", "I-PER"], "IOB1", ["B-PER", "B-PER"]),
        (["B-PER I-PER E-PER S-PER", "O S-LOC"], "BIOES", ["B-PER I-PER I-PER B-PER", "O B-LOC"]),
        (["B-a L-a U-b"], "BILOU", ["B-a I-a B-b"]),
        (["B-a M-a E-a S-b"], "BMES", ["B-a I-a I-a B-b"]),
        (["B I O B"], "BIO", ["B-ENTITY I-ENTITY O B-ENTITY"]),
        (["B-art-film I-art-film"], "BIO", ["B-art-film I-art-film"]),
    ],
)
def test_schemes_become_bio(texts: list[str], scheme: str, bio: list[str]) -> None:
    assert convert(*texts) == (scheme, bio)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["B-PER O", "O NN"], "file, line 11: 'NN' is no tag; write O, or B- and I-"),
        (["O b-PER"], "file, line 1: 'b-PER' is no tag"),
        (["O B-"], "file, line 1: 'B-' is no tag"),
        (
            ["B-PER E-PER", "B-PER L-PER"],
            "file, line 11: tag L-PER is of another scheme than tags with B and E before it",
        ),
        (["S-PER M-PER", "U-PER"], "file, line 10: tag U-PER is of another scheme than tags with M and S"),
        (
            ["O B-PER", "O I-PER"],
            "file, line 11: I-PER begins an entity, as in IOB1, while B- does in file, line 1, as in BIO; write B-PER",
        ),
        (["B-PER I-LOC"], "file, line 1: I-LOC begins an entity, as in IOB1, while B- does in file, line 0"),
        (["B-PER O S-PER"], "file, line 0: the PER that ends here has no tag of an end"),
        (["B-PER I-PER", "S-LOC"], "file, line 1: the PER that ends here has no tag of an end"),
        (["B-PER S-PER"], "file, line 0: the PER that ends here"),
        (["B-PER E-LOC"], "file, line 0: the PER that ends here"),
        (["S-PER E-PER"], "file, line 1: E-PER goes on with no entity; begin it with a B-PER"),
        (["O I-PER E-PER"], "file, line 1: I-PER goes on with no entity"),
    ],
)
def test_what_is_no_scheme_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(*texts)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


#: texts of words outside and of entities as (type, words)
TEXTS = st.lists(
    st.lists(st.one_of(st.none(), st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 4))), max_size=8),
    max_size=4,
)


@given(TEXTS, st.sampled_from(["BIOES", "BILOU", "BMES", "IOB1"]))
def test_every_scheme_says_the_same(texts: list[list[tuple[str, int] | None]], scheme: str) -> None:
    def write(text: list[tuple[str, int] | None], scheme: str) -> list[str]:
        tags: list[str] = []
        letters = {role: letter for letter, role in SCHEMES.get(scheme, {}).items()}
        for entity in text:
            if entity is None:
                tags.append("O")
                continue
            kind, words = entity
            if scheme == "IOB1":
                follows = bool(tags) and tags[-1][2:] == kind
                row = ["B" if follows else "I", *"I" * (words - 1)]
            elif words == 1:
                row = [letters.get("S", "B")]
            else:
                row = ["B", *letters["I"] * (words - 2), letters.get("E", "I")]
            tags += [f"{letter}-{kind}" for letter in row]
        return tags

    expected = [write(text, "BIO") for text in texts]
    assert to_bio([write(text, scheme) for text in texts], lambda *_: "")[1] == expected
    assert to_bio(expected, lambda *_: "") == ("BIO", expected)


def test_what_a_tag_is() -> None:
    assert is_tag("O")
    assert is_tag("S-work of art")
    assert not is_tag("text")
    assert not is_tag("B-\t")


def test_the_examples_hold() -> None:
    assert doctest.testmod(schemes).failed == 0
