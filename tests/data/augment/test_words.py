"""A text is what its words and gaps are, whatever is done to it, and entities stay whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.data.augment.words import Words, like, of_spans, of_tokens, segments, split_text
from tests.data.augment.synonyms import tagged

TAGGED = tagged("Ann/B-PER Lee/I-PER sees/O a/O boat/O in/O Rome/B-LOC ./O")


@given(st.text(alphabet="ab'’-_ .é1\n漢", max_size=30))
def test_a_text_is_put_together_as_it_was(text: str) -> None:
    words = split_text(text)
    assert words.text == text
    assert [text[start:stop] for start, stop in words.spans] == list(words.words)
    assert words.plain == list(range(len(words.words)))
    for index in range(len(words.words)):
        assert len(words.without(index).words) == len(words.words) - 1
    for index in words.openings:
        assert words.with_inserted(index, "new").words.count("new") == words.words.count("new") + 1


def test_what_is_a_word() -> None:
    assert split_text("It 's -lrb- isn't 3 km_h n't well-made").words == ("It", "isn't", "3", "n't", "well-made")
    assert of_tokens(["@me", "http://x.y", ",", "U.S.", "so"], ["O"] * 5).plain == [4]


def test_spaces_are_neither_doubled_nor_lost() -> None:
    words = split_text("a charming , film")
    assert words.without(1).text == "a , film"
    assert words.without(0).text == "charming , film"
    assert words.with_inserted(1, "very").text == "a very charming , film"
    assert words.with_inserted(3, "too").text == "a charming , film too"
    assert words.with_inserted(0, "oh").text == "oh a charming , film"
    assert split_text(" (yes) ").with_inserted(1, "x").text == " (yes x) "


def test_nothing_is_put_into_an_entity_or_a_compound() -> None:
    assert TAGGED.openings == [0, 2, 3, 4, 5, 6, 7, 8]
    assert split_text("a (b) c").openings == [0, 2, 3]


def test_entities_are_what_the_tags_say() -> None:
    assert TAGGED.entities == [(0, 2, "PER"), (6, 7, "LOC")]
    assert TAGGED.free == [2, 3, 4, 5]
    assert segments(TAGGED) == [[], [], [2, 3, 4, 5], [], []]
    assert of_tokens(["a", "b"], ["B-X", "B-X"]).entities == [(0, 1, "X"), (1, 2, "X")]


def test_a_spliced_entity_keeps_the_rest() -> None:
    new = TAGGED.spliced(0, 2, ("Bo",), ("B-PER",)).spliced(5, 6, ("New", "York"), ("B-LOC", "I-LOC"))
    assert new.text == "Bo sees a boat in New York ."
    assert new.entities == [(0, 1, "PER"), (5, 7, "LOC")]


def test_a_raw_text_keeps_its_punctuation_with_tags() -> None:
    words: Words = of_spans("Hi, Ann!", [(0, 2), (2, 3), (4, 7), (7, 8)], ["O", "O", "B-PER", "O"])
    assert words.text == "Hi, Ann!"
    assert words.spliced(2, 3, ("Bo", "Li"), ("B-PER", "I-PER")).text == "Hi, Bo Li!"


def test_capitals_are_those_of_the_word_that_was_there() -> None:
    assert [like("movie", word) for word in ("film", "Film", "FILM", "A")] == ["movie", "Movie", "MOVIE", "Movie"]
