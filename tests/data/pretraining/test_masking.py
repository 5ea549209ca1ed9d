from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.pretraining import masking
from engine.data.pretraining.masking import (
    Bits,
    Ids,
    Masked,
    MaskingRate,
    MaskingRules,
    derive_key,
    mask_tokens,
    masked_count,
    random_bits,
    sample_keys,
    uniform,
)

MASK, SPECIAL, VOCABULARY = 4, 5, 1000
REGULAR = np.arange(SPECIAL, VOCABULARY)


def rules(probability: float = 0.15, continues_word: np.ndarray | None = None) -> MaskingRules:
    return MaskingRules(probability, MASK, REGULAR, continues_word)


def sequences(lengths: list[int], seed: int = 0) -> tuple[Ids, np.ndarray, Ids]:
    """Packed ids with a special token at both ends of each sequence, their eligibility, their lengths."""
    total = np.array(lengths)
    ids = np.random.default_rng(seed).integers(SPECIAL, VOCABULARY, total.sum())
    ends = np.cumsum(total) - 1
    eligible = np.ones(len(ids), np.bool_)
    eligible[ends] = eligible[ends - total + 1] = False
    ids[~eligible] = 2
    return ids, eligible, total


def masked(lengths: list[int], keys: Bits, probability: float = 0.15) -> tuple[Ids, Masked]:
    ids, eligible, total = sequences(lengths)
    return ids, mask_tokens(ids, eligible, total, keys, rules(probability))


def test_random_bits_are_the_published_outputs_of_splitmix64() -> None:
    assert random_bits(0, np.arange(3)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert random_bits(1234567, np.arange(2)).tolist() == [6457827717110365317, 3203168211198807973]


def test_derived_keys_depend_on_every_word_and_on_their_order() -> None:
    keys = [derive_key(1, 2, 3), derive_key(1, 3, 2), derive_key(0, 2, 3), derive_key(1, 2, 4), derive_key(1, 2)]
    assert len({int(key) for key in keys}) == len(keys)


def test_uniform_numbers_span_the_half_open_unit_interval() -> None:
    assert uniform(np.array([0, 2**63, 2**64 - 1], np.uint64)).tolist() == [0.0, 0.5, 1 - 2**-53]


@pytest.mark.parametrize(
    ("tokens", "probability", "count"),
    [(1, 0.15, 1), (3, 0.15, 1), (9, 0.15, 1), (10, 0.15, 2), (125, 0.15, 19), (509, 0.15, 76), (5, 0.5, 3)],
)
def test_the_count_is_the_rounded_share_and_at_least_one(tokens: int, probability: float, count: int) -> None:
    assert masked_count(tokens, probability) == count


def test_golden_sample() -> None:
    """Pinned: a change here changes what every resumed run sees."""
    ids = np.array([2, *range(100, 120), 3])
    eligible = np.array([False, *[True] * 20, False])
    result = mask_tokens(ids, eligible, np.array([22]), sample_keys(1, 0, [2]), rules(0.25))
    assert result.positions.tolist() == GOLDEN_POSITIONS
    assert result.labels.tolist() == [99 + position for position in GOLDEN_POSITIONS]
    assert result.ids[result.positions].tolist() == GOLDEN_REPLACEMENTS


@given(st.lists(st.integers(3, 60), min_size=1, max_size=8), st.floats(0.01, 0.5), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_sequence_has_exactly_its_count_and_no_special_token(
    lengths: list[int], probability: float, whole_word: bool, seed: int
) -> None:
    ids, eligible, total = sequences(lengths, seed)
    continues = np.random.default_rng(seed).random(VOCABULARY) < 0.5 if whole_word else None
    keys = sample_keys(seed, 0, np.arange(len(total)))
    result = mask_tokens(ids, eligible, total, keys, rules(probability, continues))
    owner = np.repeat(np.arange(len(total)), total)[result.positions]
    assert np.bincount(owner, minlength=len(total)).tolist() == masked_count(total - 2, probability).tolist()
    assert (np.diff(result.positions) > 0).all()
    assert eligible[result.positions].all()
    assert (result.labels == ids[result.positions]).all()
    untouched = np.setdiff1d(np.arange(len(ids)), result.positions)
    assert (result.ids[untouched] == ids[untouched]).all()


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_sample_is_masked_alike_in_every_batch_packed_or_padded(whole_word: bool) -> None:
    ids, eligible, total = sequences([12, 40, 25])
    continues = np.arange(VOCABULARY) % 3 == 0 if whole_word else None
    keys = sample_keys(3, 1, np.array([10, 11, 12]))
    together = mask_tokens(ids, eligible, total, keys, rules(0.3, continues))
    padded_ids, padded_eligible = np.zeros((3, 50), np.int64), np.zeros((3, 50), np.bool_)
    for row, (start, length) in enumerate(zip(np.cumsum(total) - total, total, strict=True)):
        part = slice(start, start + length)
        alone = mask_tokens(ids[part], eligible[part], total[row : row + 1], keys[row : row + 1], rules(0.3, continues))
        assert (alone.ids == together.ids[part]).all()
        padded_ids[row, :length], padded_eligible[row, :length] = ids[part], eligible[part]
    padded = mask_tokens(padded_ids.ravel(), padded_eligible.ravel(), np.full(3, 50), keys, rules(0.3, continues))
    for row, (start, length) in enumerate(zip(np.cumsum(total) - total, total, strict=True)):
        assert (padded.ids.reshape(3, 50)[row, :length] == together.ids[start : start + length]).all()
    assert (padded.labels == together.labels).all()


def test_seed_epoch_and_sample_each_change_the_choice() -> None:
    keys = [sample_keys(*words, [5]) for words in ((1, 0), (2, 0), (1, 1))] + [sample_keys(1, 0, [6])]
    choices = {tuple(masked([62], key)[1].positions) for key in keys}
    assert len(choices) == 4


def test_replacements_are_80_10_10_and_substitutes_uniform() -> None:
    _, result = masked([128] * 2000, sample_keys(1, 0, np.arange(2000)))
    count, new = len(result.positions), result.ids[result.positions]
    kept, mask = new == result.labels, new == MASK
    substituted = ~kept & ~mask
    # A substitute equals the original once in 995 times, far below the tolerance of four standard deviations.
    for share, expected in ((mask, 0.8), (substituted, 0.1), (kept, 0.1)):
        assert abs(share.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / count) + 0.0001
    assert new[substituted].min() >= SPECIAL
    assert abs(new[substituted].mean() - REGULAR.mean()) < 4 * REGULAR.std() / np.sqrt(substituted.sum())


def test_a_hole_in_the_regular_ids_is_never_substituted() -> None:
    ids, eligible, total = sequences([128] * 300)
    gapped = MaskingRules(0.5, MASK, np.array([7, 900]))
    result = mask_tokens(ids, eligible, total, sample_keys(1, 0, np.arange(300)), gapped)
    new = result.ids[result.positions]
    assert set(new[(new != result.labels) & (new != MASK)].tolist()) == {7, 900}


def test_the_choice_is_uniform_over_positions() -> None:
    samples = 20000
    _, result = masked([22] * samples, sample_keys(1, 0, np.arange(samples)))
    frequency = np.bincount(result.positions % 22, minlength=22)
    assert frequency[[0, 21]].tolist() == [0, 0]
    assert (np.abs(frequency[1:21] / samples - 0.15) < 4.5 * np.sqrt(0.15 * 0.85 / samples)).all()


def test_words_are_masked_whole_except_one_that_fills_the_count_up() -> None:
    ids, eligible, total = sequences([100] * 200)
    continues = np.random.default_rng(1).random(VOCABULARY) < 0.4
    result = mask_tokens(ids, eligible, total, sample_keys(1, 0, np.arange(200)), rules(0.15, continues))
    chosen = np.zeros(len(ids), np.bool_)
    chosen[result.positions] = True
    partial = 0
    for row in range(200):
        inner = slice(row * 100 + 1, row * 100 + 99)
        heads = np.flatnonzero(~continues[ids[inner]] | (np.arange(98) == 0))
        sizes = np.diff(np.append(heads, 98))
        taken = np.add.reduceat(chosen[inner].astype(int), heads)
        torn = (taken > 0) & (taken < sizes)
        assert torn.sum() <= 1
        if torn.any():
            partial += 1
            assert chosen[inner][heads[torn]].all(), "the pieces of a torn word are its first"
            assert sizes[taken == 0].min(initial=99) > taken[torn][0], "no other word would have fitted"
    assert partial < 20


def test_a_word_ends_at_a_special_token() -> None:
    """Segments cut in mid-word on both sides of [SEP]: words of 9 and 10 pieces, of which 10 pieces are masked."""
    ids = np.array([2, *range(100, 109), 3, *range(110, 120), 3])
    eligible = ids >= SPECIAL
    whole = rules(0.5, np.ones(VOCABULARY, np.bool_))
    found = {
        tuple(mask_tokens(ids, eligible, np.array([22]), sample_keys(1, 0, [sample]), whole).positions.tolist())
        for sample in range(20)
    }
    assert found == {tuple(range(11, 21)), (*range(1, 10), 11)}


def test_one_long_word_gives_its_first_pieces() -> None:
    ids = np.array([2, *range(100, 120), 3])
    eligible = np.array([False, *[True] * 20, False])
    every_piece_continues = np.ones(VOCABULARY, np.bool_)
    whole = rules(0.15, every_piece_continues)
    assert mask_tokens(ids, eligible, np.array([22]), sample_keys(1, 0, [0]), whole).positions.tolist() == [1, 2, 3]


def span_rules(probability: float, mean: float, continues: np.ndarray | None = None) -> MaskingRules:
    return MaskingRules(probability, MASK, REGULAR, continues, mean_span=mean)


@given(st.lists(st.integers(3, 60), min_size=1, max_size=8), st.floats(0.01, 0.5), st.booleans(), st.integers(0, 99))
@settings(max_examples=60)
def test_spans_have_exactly_the_count_and_never_cross_a_special_token(
    lengths: list[int], probability: float, whole_word: bool, seed: int
) -> None:
    ids, eligible, total = sequences(lengths, seed)
    eligible[np.random.default_rng(seed).random(len(ids)) < 0.05] = False
    eligible[np.cumsum(total) - 2] = True
    continues = np.random.default_rng(seed).random(VOCABULARY) < 0.4 if whole_word else None
    keys = sample_keys(seed, 0, np.arange(len(total)))
    result = mask_tokens(ids, eligible, total, keys, span_rules(probability, 4.0, continues))
    owner = np.repeat(np.arange(len(total)), total)
    counts = masked_count(np.bincount(owner[eligible], minlength=len(total)), probability)
    assert np.bincount(owner[result.positions], minlength=len(total)).tolist() == counts.tolist()
    assert (np.diff(result.positions) > 0).all()
    assert eligible[result.positions].all()
    assert (result.labels == ids[result.positions]).all()
    own, chosen = slice(total[0]), span_rules(probability, 4.0, continues)
    alone = mask_tokens(ids[own], eligible[own], total[:1], keys[:1], chosen)
    assert (alone.positions == result.positions[: len(alone.positions)]).all(), "the same in every batch"


@pytest.mark.parametrize("whole_word", [False, True])
def test_spans_are_those_of_a_plain_loop(whole_word: bool) -> None:
    """SpanBERT's: begin at units in random order, take a geometric number of them, until the count is reached."""
    ids, eligible, _ = sequences([60])
    eligible[[20, 21, 41]] = False
    continues = np.arange(VOCABULARY) % 3 == 0 if whole_word else None
    for sample in range(30):
        key = sample_keys(3, 0, [sample])
        owner = np.zeros(eligible.sum(), np.int64)
        units = masking._units(ids, np.flatnonzero(eligible), owner, rules(0.3, continues))
        order = masking._shuffled(units, np.zeros(1, np.int64), key)
        lengths = masking._span_lengths(units, np.zeros(1, np.int64), key, 3.0)
        first = np.full(len(order), -1)
        sequence = []
        for start in order.tolist():
            unit = start
            while unit < start + lengths[start] and unit < len(order):
                if unit > start and units.head[unit] != units.head[unit - 1] + units.size[unit - 1]:
                    break
                if first[unit] < 0:
                    first[unit] = start
                    sequence.append(unit)
                unit += 1
        heads, ordered = masking._by_span(units, order, lengths)
        assert heads.tolist() == first.tolist()
        assert ordered.tolist() == sequence


def test_span_lengths_are_geometric_and_cut_at_ten() -> None:
    ids, eligible, total = sequences([128] * 2000)
    units = masking._units(ids, np.flatnonzero(eligible), np.repeat(np.arange(2000), 126), rules())
    lengths = masking._span_lengths(units, np.cumsum(total) - total, sample_keys(1, 0, np.arange(2000)), 5.0)
    shares = np.bincount(lengths, minlength=11)[1:] / len(lengths)
    expected = [0.2 * 0.8**k for k in range(9)] + [0.8**9]
    assert np.abs(shares - expected).max() < 0.004
    assert lengths.mean() == pytest.approx(4.46, abs=0.02)


def test_a_span_becomes_mask_random_or_stays_as_a_whole() -> None:
    """Neighbours share their fate far more often than tokens that are masked alone."""
    ids, eligible, total = sequences([128] * 500)
    keys = sample_keys(1, 0, np.arange(500))
    agreeing = []
    for chosen in (span_rules(0.15, 5.0), rules(0.15)):
        result = mask_tokens(ids, eligible, total, keys, chosen)
        new = result.ids[result.positions]
        fate = np.where(new == MASK, 0, np.where(new == result.labels, 1, 2))
        beside = np.diff(result.positions) == 1
        agreeing.append(float((np.diff(fate)[beside] == 0).mean()))
        assert abs((fate == 0).mean() - 0.8) < 0.02
    assert agreeing[0] > 0.9
    assert agreeing[1] < 0.7  # 0.8^2 + 2 * 0.1^2


def test_other_shares_of_mask_and_random_tokens() -> None:
    ids, eligible, total = sequences([128] * 500)
    keys = sample_keys(1, 0, np.arange(500))
    all_masked = mask_tokens(ids, eligible, total, keys, MaskingRules(0.3, MASK, REGULAR, None, 1.0, 0.0))
    assert (all_masked.ids[all_masked.positions] == MASK).all()
    halves = mask_tokens(ids, eligible, total, keys, MaskingRules(0.3, MASK, REGULAR, None, 0.0, 0.5))
    assert abs((halves.ids[halves.positions] == halves.labels).mean() - 0.5) < 0.02


def test_each_sequence_may_have_its_own_share() -> None:
    ids, eligible, total = sequences([102] * 3)
    shares = np.array([0.1, 0.3, 0.15])
    result = mask_tokens(ids, eligible, total, sample_keys(1, 0, np.arange(3)), MaskingRules(shares, MASK, REGULAR))
    assert np.bincount(result.positions // 102).tolist() == [10, 30, 15]


def test_a_rate_falls_linearly_over_the_run_and_stays() -> None:
    rate = MaskingRate(0.3, 0.15, 2.0)
    places = ((0, 0), (0, 5), (1, 0), (2, 0), (3, 9))
    shares = [float(rate.of_samples(epoch, np.array([i]), 10)[0]) for epoch, i in places]
    assert shares == pytest.approx([0.3, 0.2625, 0.225, 0.15, 0.15])
    constant = MaskingRate(0.15, 0.15, 1.0).of_samples(5, np.arange(3), 7)
    assert constant.tolist() == [0.15] * 3


# Computed once with plain integers: the five lowest of the 20 hashes, then each one's 80/10/10 draw.
GOLDEN_POSITIONS = [1, 6, 10, 12, 19]
GOLDEN_REPLACEMENTS = [100, 708, 453, 4, 931]
