"""Sentences made of templates: a pair differs where it should, and what is called right is so by rules of its own."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.scaling.probes import lexicon
from engine.scaling.probes.templates import TEMPLATES, Pair, pairs_of

IRREGULAR = {"men", "women", "children"}
COUNT = 300


def is_plural(noun: str) -> bool:
    return noun in IRREGULAR or (noun.endswith("s") and not noun.endswith("ss"))


def words(sentence: str) -> list[str]:
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    return sentence[:-1].lower().split()


def differing(pair: Pair) -> tuple[list[int], list[str], list[str]]:
    good, bad = words(pair.good), words(pair.bad)
    assert len(good) == len(bad)
    return [place for place, (one, other) in enumerate(zip(good, bad, strict=True)) if one != other], good, bad


@pytest.mark.parametrize("name", TEMPLATES)
def test_pairs_are_different_and_drawn_by_the_seed(name: str) -> None:
    pairs = pairs_of(name, COUNT, 0)
    assert len(set(pairs)) == len(pairs) == COUNT
    assert all(pair.good != pair.bad for pair in pairs)
    assert pairs_of(name, COUNT, 0) == pairs
    assert pairs_of(name, 20, 0) == pairs[:20]
    assert len(set(pairs_of(name, COUNT, 1)) & set(pairs)) < COUNT / 2
    assert len(pairs_of(name, 7, 0)) == 6


@pytest.mark.parametrize("name", TEMPLATES)
def test_words_alone_don_t_tell_good_from_bad(name: str) -> None:
    pairs = pairs_of(name, COUNT, 0)
    good, bad = (Counter(word for pair in pairs for word in words(getattr(pair, side))) for side in ("good", "bad"))
    assert good == bad


@pytest.mark.parametrize("name", ["agreement_simple", "agreement_attractor", "agreement_relative"])
def test_verbs_agree_with_the_subject(name: str) -> None:
    for pair in pairs_of(name, COUNT, 0):
        (place,), good, bad = differing(pair)
        assert good[place].endswith("s") == (not is_plural(good[1]))
        assert bad[place].endswith("s") == is_plural(good[1])
        before = good[place - 1]
        if name == "agreement_simple":
            assert place == 2
        elif name == "agreement_attractor":
            assert is_plural(before) != is_plural(good[1])
        else:
            assert good[2:4] == ["that", "the"]
            assert is_plural(good[4]) != is_plural(good[1])
            assert before.endswith("s") == (not is_plural(good[4]))


def test_reflexives_agree_in_number_and_sex() -> None:
    men, women = ({noun for forms in nouns for noun in forms} for nouns in (lexicon.MEN, lexicon.WOMEN))
    for pair in pairs_of("reflexive", COUNT, 0):
        (place,), good, bad = differing(pair)
        assert place == 3
        assert good[1] in men | women
        single = "himself" if good[1] in men else "herself"
        right, wrong = ("themselves", single) if is_plural(good[1]) else (single, "themselves")
        assert (good[place], bad[place]) == (right, wrong)


def test_determiners_agree_with_their_noun() -> None:
    for pair in pairs_of("determiner", COUNT, 0):
        (place,), good, bad = differing(pair)
        assert place == 4
        plural = good[3] in ("these", "those")
        assert plural or good[3] in ("this", "that")
        assert is_plural(good[place]) == plural != is_plural(bad[place])


def test_ever_is_in_the_scope_of_no_in_the_good_sentence_alone() -> None:
    for pair in pairs_of("polarity", COUNT, 0):
        places, good, bad = differing(pair)
        assert places == [0, 3]
        assert (good[0], good[2:4]) == ("no", ["that", "the"])
        assert (bad[0], bad[2:4]) == ("the", ["that", "no"])
        assert good[6:8] == ["have" if is_plural(good[1]) else "has", "ever"]
        assert good[5].endswith("s") == (not is_plural(good[4]))


def test_forms_of_words_are_those_of_english() -> None:
    nouns = (*lexicon.PEOPLE, *lexicon.MEN, *lexicon.WOMEN, *lexicon.THINGS)
    assert all(is_plural(many) and not is_plural(one) for one, many in nouns)
    assert all(third.endswith("s") and not base.endswith("s") for third, base in (*lexicon.ACTIONS, *lexicon.RELATIONS))
    for words in (lexicon.PEOPLE, lexicon.MEN, lexicon.WOMEN, lexicon.THINGS, lexicon.ACTIONS, lexicon.RELATIONS):
        assert len(set(words)) == len(words)
