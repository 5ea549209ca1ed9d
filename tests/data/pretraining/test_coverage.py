"""What share of a text the pairs of epochs show: counted exactly, and nearly all of it within three epochs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.pretraining import pairs
from engine.data.pretraining.pairs import PairPlan, plan_epoch, shown_share

Corpus = tuple[np.ndarray, np.ndarray]
TOKENS_A_WORD = 1.3


def corpus(documents: list[list[int]]) -> Corpus:
    lengths = np.array([length for document in documents for length in document], np.int32)
    return lengths, np.cumsum([0, *map(len, documents)])


def written(share: float, long: tuple[int, int], sentences: int = 40, ordinary: tuple[int, int] = (4, 12)) -> Corpus:
    """400 documents; sentences have a number of words within `ordinary`, and a `share` of them one within `long`."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, sentences + 1, 400)
    total = int(counts.sum())
    is_long = rng.random(total) < share
    words = np.where(is_long, rng.integers(long[0], long[1] + 1, total), rng.integers(*ordinary, total, endpoint=True))
    return (words * TOKENS_A_WORD).astype(np.int32), np.concatenate(([0], np.cumsum(counts)))


def plan(text: Corpus, length: int = 128, epoch: int = 0) -> PairPlan:
    return plan_epoch(*text, sequence_length=length, short_sequence_probability=0.1, seed=1, epoch=epoch)


def shown(result: PairPlan, tokens: int) -> np.ndarray:
    """True at each token that is in a segment."""
    found = np.zeros(tokens, bool)
    for starts, lengths in ((result.a_start, result.a_length), (result.b_start, result.b_length)):
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            found[start : start + length] = True
    return found


def never_shown(text: Corpus, length: int = 128, epochs: int = 3) -> float:
    """Share of the text that none of the first epochs shows."""
    tokens = int(text[0].sum())
    return 1 - np.logical_or.reduce([shown(plan(text, length, epoch), tokens) for epoch in range(epochs)]).mean()


def test_over_long_sentences_are_shown_within_three_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence in twenty has 80 to 400 words: more than a third of the text was lost while they were whole."""
    text = written(0.05, (80, 400))
    assert never_shown(text) < 0.003
    assert shown_share(plan(text), int(text[0].sum())) > 0.92
    monkeypatch.setattr(pairs, "_without_over_long", lambda lengths, starts, limit: (lengths, starts))
    assert never_shown(text) > 0.35


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (written(0.05, (80, 400)), 512),
        (written(0.05, (80, 400)), 64),
        (written(0.05, (60, 96)), 128),  # more than half of a pair, less than a whole one
        (written(1.0, (77, 96)), 128),  # the same, and no other sentence
        (written(1.0, (80, 400)), 128),
        (written(0.002, (5000, 40000)), 128),  # text without full stops
        (written(0.05, (80, 400), sentences=1), 128),  # documents of one sentence
    ],
)
def test_next_to_nothing_is_never_shown_whatever_the_sentences(text: Corpus, length: int) -> None:
    assert never_shown(text, length) < 0.006


def test_parts_of_over_long_sentences_keep_half_of_the_pairs_random() -> None:
    result = plan(written(1.0, (80, 400)))
    assert abs(result.is_random.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(result))


@given(st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=6), min_size=2, max_size=8), st.integers(8, 128))
@settings(max_examples=100, deadline=None)
def test_every_token_is_in_a_segment_or_counted_as_not_shown(documents: list[list[int]], length: int) -> None:
    text = corpus(documents)
    result, tokens = plan(text, length), int(text[0].sum())
    assert shown_share(result, tokens) == shown(result, tokens).mean()


@pytest.mark.parametrize("bits", [1, 4, 10, 16])
def test_of_a_long_text_every_so_manyth_token_is_looked_at(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = written(0.05, (80, 400))
    result, tokens = plan(text), int(text[0].sum())
    monkeypatch.setattr(pairs, "_LOOKED_AT_BITS", bits)
    step = next(2**shift for shift in range(64) if -(-tokens // 2**shift) <= 2**bits)
    assert step > 1
    assert shown_share(result, tokens) == shown(result, tokens)[::step].mean()
