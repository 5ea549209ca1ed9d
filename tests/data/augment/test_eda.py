"""EDA's operations do what the paper says, keep tags with their words, and depend on their key alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from engine.data.augment.characters import NEIGHBOURS, Characters, misspelt
from engine.data.augment.draws import Draws, draws_for
from engine.data.augment.eda import OPERATIONS, TAGGED, Eda, mentions_of
from engine.data.augment.method import Method
from engine.data.augment.words import Words, split_text
from tests.data.augment.synonyms import THESAURUS, Thesaurus, tagged

TEXT = split_text("This film is not a good film, and nobody sees a boat.")
SENTENCES = [
    tagged("Ann/B-P Lee/I-P sees/O a/O good/O boat/O in/O Rome/B-L ,/O not/O a/O film/O ./O"),
    tagged("A/O film/O of/O Bo/B-P 's/O"),
    tagged("Rome/B-L"),
]


def many(method: Method, words: Words, count: int = 200) -> list[Words]:
    return method([words] * count, draws_for(1, np.arange(count)))


def eda(*operations: str, share: float = 0.1) -> Eda:
    return Eda(share, Thesaurus(), operations, mentions_of(SENTENCES))


def test_draws_are_uniform_and_of_their_key() -> None:
    first, again = draws_for(3, 1, np.arange(4)), draws_for(3, 1, np.arange(2, 4))
    values = [[each.uniform() for _ in range(300)] for each in first]  # beyond the block that is made at once
    assert values[2:] == [[each.uniform() for _ in range(300)] for each in again]
    assert abs(np.mean(values) - 0.5) < 0.03
    assert sorted(Draws(7, []).some_of(range(5), 9)) == [0, 1, 2, 3, 4]


def test_replacement_takes_synonyms_alone_and_all_places_of_a_word() -> None:
    new = many(eda("replace"), TEXT)
    changes = Counter(pair for one in new for pair in zip(TEXT.words, one.words, strict=True) if pair[0] != pair[1])
    known = {(word, synonym) for word, synonyms in THESAURUS.items() for synonym in synonyms}
    assert set(changes) == {*known, ("a", "an")}
    assert all(one.words.count("movie") in (0, 2) for one in new)
    assert any("an ark" in one.text for one in new)
    assert not any("a ark" in one.text for one in new)


def test_insertion_puts_synonyms_anywhere() -> None:
    new = many(eda("insert"), TEXT)
    known = {word for words in THESAURUS.values() for word in words}
    places = set()
    for one in new:
        (place,) = [index for index, word in enumerate(one.words) if word in known]
        places.add(place)
        assert [word for word in one.words if word not in known and word != "an"][:2] == ["This", "film"]
    assert places == set(range(len(TEXT.words) + 1))


def test_a_swap_keeps_the_words_and_the_negations_in_place() -> None:
    for one in many(eda("swap", share=0.3), TEXT):
        assert Counter(one.words) == Counter(TEXT.words)
        assert [index for index, word in enumerate(one.words) if word in ("not", "nobody")] == [3, 8]
        assert one.gaps == TEXT.gaps


def test_deletion_has_its_share_and_leaves_negations() -> None:
    new = many(eda("delete", share=0.5), TEXT)
    lengths = [len(one.words) for one in new]
    assert all({"not", "nobody"} <= set(one.words) for one in new)
    assert abs(np.mean(lengths) - (2 + 10 * 0.5)) < 0.5
    assert max(lengths) < len(TEXT.words)
    alone = split_text("wonderful")
    assert many(eda("delete"), alone, 3) == [alone] * 3


@pytest.mark.parametrize("operation", [*OPERATIONS, *TAGGED])
def test_tags_stay_with_their_words(operation: str) -> None:
    known = {kind: set(each) for kind, each in mentions_of(SENTENCES).items()}
    for words in SENTENCES:
        for one in many(eda(operation, share=0.3), words, 60):
            assert len(one.tags) == len(one.words) == len(one.gaps) - 1
            assert [kind for *_, kind in one.entities] == [kind for *_, kind in words.entities]
            found = [one.words[first:stop] for first, stop, _ in one.entities]
            if operation == "mention":
                assert all(each in known[kind] for each, (*_, kind) in zip(found, one.entities, strict=True))
            else:
                assert found == [words.words[first:stop] for first, stop, _ in words.entities]


def test_every_operation_is_drawn_and_none_that_changes_nothing() -> None:
    new = many(eda(*OPERATIONS), TEXT)
    assert all(one != TEXT for one in new)
    lengths = Counter(int(np.sign(len(one.words) - len(TEXT.words))) for one in new)
    assert min(lengths[-1], lengths[1], lengths[0] / 2) > 25


def test_new_examples_don_t_depend_on_their_neighbours() -> None:
    texts = [TEXT, split_text("A boat sees a good film"), *SENTENCES]
    for method in (eda(*OPERATIONS), Characters(0.2)):
        together = method(texts, draws_for(5, np.arange(len(texts))))
        apart = [method([texts[index]], draws_for(5, np.array([index])))[0] for index in reversed(range(len(texts)))]
        assert together == apart[::-1]


def test_fingerprints_tell_methods_apart() -> None:
    methods = [eda("swap"), eda("swap", share=0.2), eda("delete"), Characters(0.1), Characters(0.2)]
    assert len({method.fingerprint for method in methods}) == len(methods)


def test_a_misspelling_is_one_edit_behind_the_first_letter() -> None:
    kinds = set()
    for draws in draws_for(2, np.arange(300)):
        new = misspelt("Wonder", draws)
        assert new[0] == "W"
        kinds.add(len(new) - 6)
        if len(new) == 6 and sorted(new) != sorted("Wonder"):
            (change,) = [pair for pair in zip("Wonder", new, strict=True) if pair[0] != pair[1]]
            assert change[1] in NEIGHBOURS[change[0]]
    assert kinds == {-1, 0, 1}
    assert set(NEIGHBOURS["g"]) == set("fhtyvb")


def test_misspellings_keep_short_words_and_tags() -> None:
    for one in many(Characters(0.3), SENTENCES[0], 50):
        assert one.tags == SENTENCES[0].tags
        assert one.words[:2] == ("Ann", "Lee")
        assert one != SENTENCES[0]
