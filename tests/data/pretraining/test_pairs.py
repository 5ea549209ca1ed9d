from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.data.pretraining.pairs as pairs
from engine.data.pretraining.masking import PAIRS_DOMAIN, derive_key, random_bits, uniform
from engine.data.pretraining.pairs import PLAN_VERSION, PairPlan, plan_epoch, plan_version, truncated_lengths
from engine.errors import UserError

Row = tuple[int, int, int, int, bool]
documents_of_sentences = st.lists(st.lists(st.integers(0, 40), max_size=12), min_size=2, max_size=12)
documents_with_long_sentences = st.lists(st.lists(st.integers(0, 200), max_size=12), min_size=2, max_size=12)


def corpus(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([length for document in documents for length in document], np.int32)
    return lengths, np.cumsum([0, *map(len, documents)])


def plan(documents: list[list[int]], length: int = 128, short: float = 0.1, seed: int = 1, epoch: int = 0) -> PairPlan:
    return plan_epoch(
        *corpus(documents), sequence_length=length, short_sequence_probability=short, seed=seed, epoch=epoch
    )


def rows(result: PairPlan) -> list[Row]:
    return list(zip(*(getattr(result, field.name).tolist() for field in fields(PairPlan)), strict=True))


def text(seed: int = 0, documents: int = 2000) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 50, rng.integers(1, 40)).tolist() for _ in range(documents)]


def document_of(starts: np.ndarray, documents: list[list[int]]) -> np.ndarray:
    return np.searchsorted(np.cumsum([sum(document) for document in documents]), starts, side="right")


def test_two_documents_of_one_sentence_pair_with_each_other() -> None:
    assert sorted(rows(plan([[5], [7]]))) == [(0, 5, 5, 7, True), (5, 7, 0, 5, True)]


def test_a_true_pair_is_the_whole_of_a_two_sentence_document() -> None:
    """Each document is one chunk of two sentences: true next, or A is its first and its second makes a chunk."""
    documents = [[4, 6]] * 40
    result = rows(plan(documents, short=0.0))
    true = [row for row in result if not row[4]]
    assert true
    for a_start, a_length, b_start, b_length, _ in true:
        assert a_start % 10 == 0
        assert (a_length, b_start, b_length) == (4, a_start + 4, 6)
    covered_by_random = {row[0] for row in result if row[4]}
    untouched = set(range(0, 400, 10)) - {row[0] for row in true}
    assert covered_by_random == untouched | {start + 4 for start in untouched}


def test_golden_plan() -> None:
    """Pinned: a change here changes what every resumed run sees."""
    result = rows(plan([[9, 10, 8, 10, 7], [10, 6, 10, 5, 9]], length=23, short=0.0))
    assert result == GOLDEN


def test_golden_plan_with_an_over_long_sentence() -> None:
    result = rows(plan([[9, 10, 8, 10, 7], [4, 30, 5]], length=23, short=0.0))
    assert result == GOLDEN_OVER_LONG


@pytest.mark.parametrize(("length", "digest"), [(128, "4f96c848f38c9d83"), (512, "63b63f9a22368a16")])
def test_a_large_plan_without_over_long_sentences_is_that_of_version_1(length: int, digest: str) -> None:
    lengths, _ = corpus(text())
    assert plan_version(lengths, length) == 1
    assert hashlib.sha256(repr(rows(plan(text(), length))).encode()).hexdigest()[:16] == digest


def test_the_plan_has_a_new_version_only_where_a_sentence_is_over_long() -> None:
    assert [plan_version(np.array([5, longest]), 128) for longest in (62, 63, 400)] == [1, PLAN_VERSION, PLAN_VERSION]
    assert plan_version(np.array([5, 63]), 512) == 1


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(3, 4, (3, 4)), (9, 3, (7, 3)), (3, 9, (3, 7)), (9, 9, (5, 5)), (6, 5, (5, 5)), (5, 6, (5, 5)), (1, 99, (1, 9))],
)
def test_truncation_of_hand_checked_pairs(a: int, b: int, expected: tuple[int, int]) -> None:
    assert tuple(map(int, truncated_lengths(a, b, 10))) == expected


@given(st.integers(1, 200), st.integers(1, 200), st.integers(2, 60))
def test_truncation_equals_removing_one_token_at_a_time(a: int, b: int, limit: int) -> None:
    expected = [a, b]
    while sum(expected) > limit:
        expected[0 if expected[0] > expected[1] else 1] -= 1
    assert list(map(int, truncated_lengths(a, b, limit))) == expected


def divided(documents: list[list[int]], limit: int) -> list[list[int]]:
    """The documents with over-long sentences in equal parts, the longer ones first."""

    def parts(length: int) -> list[int]:
        if length <= limit // 2:
            return [length]
        count = next(n for n in range(1, length + 1) if n * (limit // 4) >= length)
        return [length // count + (i < length % count) for i in range(count)]

    return [[part for length in document for part in parts(length)] for document in documents]


@given(st.lists(st.lists(st.integers(0, 300), max_size=6), min_size=1, max_size=6), st.integers(5, 125))
@settings(max_examples=200, deadline=None)
def test_over_long_sentences_become_equal_parts(documents: list[list[int]], limit: int) -> None:
    lengths, starts = pairs._without_over_long(*corpus(documents), limit)
    expected = divided(documents, limit)
    assert lengths.tolist() == [part for document in expected for part in document]
    assert starts.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert lengths.max(initial=0) <= limit // 2
    assert [sum(document) for document in expected] == [sum(document) for document in documents]


def chunk_by_chunk(documents: list[list[int]], limit: int, short: float, probability: float) -> tuple[list[Row], float]:
    """BERT's loop, one chunk at a time, on the same random numbers (seed 1, epoch 0), and its share of forced ones."""
    lengths, starts = corpus(documents)
    tokens = np.concatenate(([0], np.cumsum(lengths))).tolist()
    key = derive_key(1, PAIRS_DOMAIN, 0)

    def draw(stream: int, sentence: int) -> float:
        return float(uniform(random_bits(random_bits(key, stream), sentence)))

    def removed_in_front(stream: int, sentence: int, count: int) -> int:
        words = [int(random_bits(random_bits(random_bits(key, stream), sentence), word)) for word in range(20)]
        bits = [word >> (63 - bit) & 1 for word in words for bit in range(64)]
        return sum(bits[:count])

    found, forced = [], 0
    for document, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        i = begin
        while i < end:
            u, target = draw(pairs._TARGET, i), limit
            if u < short:
                target = min(limit, 2 + int(u / short * (limit - 1)))
            stop = i + 1
            while stop < end and tokens[stop] - tokens[i] < target:
                stop += 1
            a_end = i + 1 + int(draw(pairs._A_END, i) * (stop - i - 1))
            a, b = [tokens[i], tokens[a_end]], [tokens[a_end], tokens[stop]]
            is_random = stop - i == 1 or draw(pairs._COIN, i) < probability
            forced += stop - i == 1
            if is_random:
                other = int(draw(pairs._DOCUMENT, i) * (len(documents) - 1))
                other += other >= document
                first = int(starts[other]) + int(draw(pairs._SENTENCE, i) * len(documents[other]))
                last = first + 1
                while last < starts[other + 1] and tokens[last] - tokens[first] < target - (a[1] - a[0]):
                    last += 1
                b = [tokens[first], tokens[last]]
            a_kept, b_kept = map(int, truncated_lengths(a[1] - a[0], b[1] - b[0], limit))
            a_front = removed_in_front(pairs._FRONT_A, i, a[1] - a[0] - a_kept)
            b_front = removed_in_front(pairs._FRONT_B, i, b[1] - b[0] - b_kept)
            found.append((a[0] + a_front, a_kept, b[0] + b_front, b_kept, is_random))
            i = a_end if is_random else stop
    return found, forced / len(found)


@pytest.mark.parametrize(("length", "short"), [(128, 0.1), (32, 0.5), (20, 0.0), (256, 1.0)])
def test_the_plan_is_that_of_berts_loop_chunk_by_chunk(length: int, short: float) -> None:
    documents = [*text(length, 12), [300, 2, 2, 900], [1]]
    balanced = 0.5
    for _ in range(16):
        probability = balanced
        expected, share = chunk_by_chunk(divided(documents, length - 3), length - 3, short, probability)
        balanced = max(0.0, (0.5 - share) / (1 - share))
        if abs(balanced - probability) < 1e-3:
            break
    assert sorted(rows(plan(documents, length, short))) == sorted(expected)


@given(documents_with_long_sentences, st.integers(8, 64), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_pairs_are_within_limits_and_documents(documents: list[list[int]], length: int, seed: int) -> None:
    if sum(sum(document) > 0 for document in documents) < 2:
        with pytest.raises(UserError, match="at least 2"):
            plan(documents, length, seed=seed)
        return
    result = plan(documents, length, seed=seed)
    assert min(result.a_length.min(), result.b_length.min()) >= 1
    assert (result.a_length + result.b_length).max() <= length - 3
    own, other = document_of(result.a_start, documents), document_of(result.b_start, documents)
    assert (own == document_of(result.a_start + result.a_length - 1, documents)).all()
    assert (other == document_of(result.b_start + result.b_length - 1, documents)).all()
    assert ((own != other) == result.is_random).all()
    true = ~result.is_random
    assert (result.a_start[true] + result.a_length[true] <= result.b_start[true]).all()


@given(documents_of_sentences, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_exactly_one_segment_when_nothing_is_truncated(documents: list[list[int]], seed: int) -> None:
    if sum(sum(document) > 0 for document in documents) < 2:
        return
    result = plan(documents, 2000, short=0.0, seed=seed)
    true = ~result.is_random
    assert (result.a_start + result.a_length == result.b_start)[true].all()
    seen = np.zeros(sum(map(sum, documents)), int)
    for start, length in zip(
        np.append(result.a_start, result.b_start[true]), np.append(result.a_length, result.b_length[true]), strict=True
    ):
        seen[start : start + length] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("sentences", [2, 3, 8, 40, 1000])
def test_half_of_the_pairs_are_random(sentences: int) -> None:
    rng = np.random.default_rng(sentences)
    documents = [rng.integers(3, 50, rng.integers(2, sentences + 1)).tolist() for _ in range(60000 // sentences)]
    result = plan(documents)
    assert abs(result.is_random.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(result))


def test_single_sentence_documents_are_all_random() -> None:
    assert plan([[9]] * 50).is_random.all()


def test_the_other_document_and_its_sentence_are_uniform() -> None:
    documents = [[10] * 4] * 5
    counts = np.zeros((5, 20))
    for seed in range(800):
        result = plan(documents, short=0.0, seed=seed)
        random = result.is_random
        np.add.at(counts, (document_of(result.a_start[random], documents), result.b_start[random] // 10), 1)
    for own in range(5):
        others = np.delete(counts[own].reshape(5, 4), own, axis=0)
        assert counts[own].sum() == others.sum()
        expected = others.sum() / 16
        assert (np.abs(others - expected) < 4.5 * np.sqrt(expected)).all()


def test_the_share_of_short_pairs_is_the_probability() -> None:
    """One-token sentences reach every target exactly; a target is at the limit of 125 once in 124 draws."""
    documents = [[1] * 250_000] * 3
    for probability in (0.0, 0.1, 0.5):
        result = plan(documents, 128, probability)
        short = (result.a_length + result.b_length < 125).mean()
        expected = probability * 123 / 124
        # Documents' ends are shorter too: a few chunks, and a random B that begins within 125 of an end.
        assert abs(short - expected) < 4 * np.sqrt(expected / len(result)) + 0.001


def test_tokens_come_off_front_and_back_equally() -> None:
    """Two sentences of 60 beside a third lose 58 tokens at a limit of 122: Binomial(58, 1/2) in front."""
    result = plan([[60, 60, 60]] * 4000, length=125, short=0.0)
    long = result.a_length == 62
    assert long.sum() > 1000
    front = result.a_start[long] % 180
    assert abs(front.mean() - 29) < 4.5 * np.sqrt(58 / 4 / long.sum())
    assert abs(front.var() - 58 / 4) < 1.5


def test_same_seed_and_epoch_give_the_same_plan_and_others_do_not() -> None:
    documents = text(documents=100)
    first = rows(plan(documents))
    assert first == rows(plan(documents))
    for other in (plan(documents, epoch=1), plan(documents, seed=2)):
        assert sorted(rows(other)) != sorted(first)


def test_the_plan_is_shuffled_over_the_whole_corpus() -> None:
    result = plan(text())
    order = result.a_start.argsort().argsort()
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 4.5 / np.sqrt(len(order))


def test_empty_sentences_and_documents_change_nothing_but_the_draws() -> None:
    result = plan([[], [0, 5, 0], [0], [], [7, 0], []])
    assert sorted(rows(result)) == [(0, 5, 5, 7, True), (5, 7, 0, 5, True)]


def test_blocks_bound_memory_without_touching_other_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = text(documents=300)
    whole = plan(documents)
    monkeypatch.setattr(pairs, "BLOCK_SENTENCES", 500)
    blocked = plan(documents)
    own, other = document_of(blocked.a_start, documents), document_of(blocked.b_start, documents)
    assert ((own != other) == blocked.is_random).all()
    assert np.abs(own - other).max() > 200, "random documents come from all blocks"
    shared = set(rows(whole)) & set(rows(blocked))
    assert len(shared) > 0.8 * len(whole), "blocks only differ in their balance of random pairs"


@pytest.mark.parametrize("documents", [[], [[]], [[5, 6, 7]], [[5], [0]]])
def test_fewer_than_two_documents_are_an_error_of_the_user(documents: list[list[int]]) -> None:
    with pytest.raises(UserError, match=r"data.path: [01] document\(s\) with text; .*at least 2"):
        plan(documents)


# Checked by hand, 20 tokens a pair. Sentences begin at 0, 9, 19, 27, 37 and, in document 1, at 44, 54, 60, 70, 75.
GOLDEN = [
    (0, 9, 61, 11, True),  # chunk 0-27, B from the sentence at 60 (15 tokens), 4 too many: 1 in front, 3 behind
    (9, 10, 22, 10, False),  # chunk 9-37 cut at 19: 10 + 18 tokens; 8 off B
    (45, 10, 60, 10, False),  # chunk 44-70 cut at 60: 16 + 10 tokens; 6 off A
    (37, 7, 70, 13, True),  # the last sentence is alone; B wants 13 of 70-84, 1 too many
    (70, 5, 75, 9, False),  # the rest of document 1, nothing to cut
]
# Document 1 is 44-83: the sentence of 30 at 48 is six of 5, at 48, 53, 58, 63, 68 and 73.
GOLDEN_OVER_LONG = [
    (73, 5, 27, 15, True),  # chunk 73-83; B wants 15 of 27-44, 2 too many
    (0, 9, 59, 11, True),  # B from the part at 58: 3 parts, 4 too many, 1 of them in front
    (9, 10, 22, 10, False),  # as above
    (44, 15, 63, 5, False),  # chunk 44-68 cut at 63: 19 + 5 tokens; 4 off A
    (37, 7, 69, 13, True),  # B from the part at 68: 15 tokens, 2 too many
    (78, 5, 20, 15, True),  # alone; B from 19-37, 3 too many
    (68, 5, 2, 15, True),  # chunk 68-83; B from 0-19, 4 too many: 2 in front, 2 behind
]
