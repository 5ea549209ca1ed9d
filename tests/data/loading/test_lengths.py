"""Facts about batches by length: which samples meet in a forward pass, and in a global batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.loading.lengths import deal, grouped_order, longest_first
from engine.data.loading.source import Indices


def random_lengths(count: int, seed: int) -> Indices:
    return np.random.default_rng(seed).integers(1, 129, count)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 9))
def test_a_deal_gives_every_sample_to_one_rank_and_balances_every_pass(
    micro: int, world: int, passes: int, seed: int
) -> None:
    lengths = random_lengths(micro * world * passes, seed)
    places = deal(lengths, micro, world)
    assert places.shape == (passes, world, micro)
    assert sorted(places.ravel().tolist()) == list(range(len(lengths)))
    assert (np.diff(places, axis=2) > 0).all()
    for one in lengths[places]:
        tokens = one.sum(axis=1)
        assert tokens.max() - tokens.min() <= one.max() - one.min()
    for longer, shorter in zip(lengths[places][:-1], lengths[places][1:], strict=True):
        assert longer.min() >= shorter.max()


def test_one_rank_and_one_pass_keep_the_order() -> None:
    assert deal(np.array([3, 9, 1, 7]), 4, 1).tolist() == [[[0, 1, 2, 3]]]


def test_a_deal_by_hand() -> None:
    # by length: 4 1 | 5 0 | 2 3 for two ranks; the second row is dealt backwards; then a pass of the shortest two rows
    lengths = np.array([6, 9, 5, 4, 10, 8, 2, 1])
    assert deal(lengths, 2, 2).tolist() == [[[0, 4], [1, 5]], [[2, 7], [3, 6]]]


def test_longest_first_keeps_equals_in_order() -> None:
    assert longest_first(np.array([2, 5, 2, 5, 1])).tolist() == [1, 3, 0, 2, 4]


@given(st.integers(1, 600), st.integers(1, 32), st.integers(0, 31), st.integers(0, 9))
def test_a_grouped_order_is_a_permutation_that_keeps_what_is_no_whole_batch(
    count: int, batch: int, begun: int, seed: int
) -> None:
    begun %= batch
    shuffled = np.random.default_rng(seed).permutation(count)
    order = grouped_order(shuffled, random_lengths(count, seed), batch, begun, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(count))
    assert order[:begun].tolist() == shuffled[:begun].tolist()
    after = begun + max(0, count - begun) // batch * batch
    assert order[after:].tolist() == shuffled[after:].tolist()


def fill(lengths: Indices, batch: int) -> float:
    """The share of tokens in grids as wide as their longest sequence."""
    rows = lengths[: len(lengths) // batch * batch].reshape(-1, batch)
    return float(rows.sum() / (rows.max(axis=1) * batch).sum())


def test_a_grouped_order_fills_the_grids() -> None:
    lengths, shuffled = random_lengths(6400, 1), np.random.default_rng(2).permutation(6400)
    order = grouped_order(shuffled, lengths, 32, 0, np.random.default_rng(3))
    assert fill(lengths[shuffled], 32) < 0.55
    assert fill(lengths[order], 32) > 0.95
    firsts = lengths[order].reshape(-1, 32)[:, 0]
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.2, "the batches come in random order"


@pytest.mark.parametrize("count", [64, 640])
def test_other_samples_meet_in_every_epoch(count: int) -> None:
    """Also in a small data set, where one window over all would sort the same neighbours together again."""
    lengths = np.arange(count)
    batches = []
    for epoch in range(2):
        generator = np.random.default_rng(epoch)
        order = grouped_order(generator.permutation(count), lengths, 8, 0, generator)
        batches.append({tuple(sorted(batch)) for batch in order.reshape(-1, 8).tolist()})
    assert not batches[0] & batches[1]
