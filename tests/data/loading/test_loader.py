from __future__ import annotations

import os
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.data.loading.loader import (
    BatchLayout,
    default_micro_batch,
    evaluation_batches,
    resolve_layout,
    training_batches,
)
from engine.data.loading.source import Cursor, Indices, MicroBatch
from engine.errors import UserError

Sample = tuple[int, int]


class Numbers:
    """Sample i of epoch e is (e, i) and weighs i; epochs differ in size."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def epoch_size(self, epoch: int) -> int:
        return self.sizes[epoch % len(self.sizes)]

    def describe(self, epoch: int, indices: Indices) -> np.ndarray:
        assert len(indices)
        assert indices.max() < self.epoch_size(epoch)
        return np.stack((np.full(len(indices), epoch), indices), axis=1)

    def join(self, descriptions: list[Any]) -> np.ndarray:
        return np.concatenate(descriptions)

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        return {"weight": float(indices.sum()), "sequences": float(len(indices))}

    def collate(self, description: Any) -> dict[str, Tensor]:
        return {"samples": torch.from_numpy(description), "process": torch.tensor(os.getpid())}


class Measured(Numbers):
    """Numbers that know lengths: pseudorandom ones of 1 to 97 tokens."""

    def lengths(self, epoch: int, indices: Indices) -> Indices:
        return 1 + (indices * 31 + epoch * 17) % 97


class Unreadable(Numbers):
    def collate(self, description: Any) -> dict[str, Tensor]:
        raise UserError("data.path: shard-3 is damaged; prepare the data again")


class Broken(Numbers):
    def collate(self, description: Any) -> dict[str, Tensor]:
        raise RuntimeError("the loader broke")


def samples(batches: list[MicroBatch]) -> list[Sample]:
    return [tuple(row) for batch in batches for row in batch.inputs["samples"].tolist()]


def stream(source: Numbers, count: int) -> list[Sample]:
    endless = ((epoch, index) for epoch in range(count) for index in range(source.epoch_size(epoch)))
    return list(islice(endless, count))


def global_batches(
    source: Numbers, size: int, micro: int, world: int, steps: int, cursor: Cursor | None = None
) -> list[list[MicroBatch]]:
    """Micro-batches of all ranks, in rank order, for each global batch."""
    layouts = [BatchLayout(size, micro, rank, world) for rank in range(world)]
    ranks = [training_batches(source, layout, cursor or Cursor(), 0) for layout in layouts]
    return [[batch for rank in ranks for batch in islice(rank, layouts[0].accumulation)] for _ in range(steps)]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_global_batches_are_the_stream_of_epochs_at_every_layout(
    sizes: list[int], micro: int, accumulation: int, world: int
) -> None:
    source, size = Numbers(*sizes), micro * accumulation * world
    found = global_batches(source, size, micro, world, 4)
    assert [samples(batch) for batch in found] == [stream(source, 4 * size)[k * size :][:size] for k in range(4)]
    assert all(len(micro_batch.inputs["samples"]) == micro for batch in found for micro_batch in batch)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_lengths_change_who_takes_a_sample_and_no_global_batch(
    sizes: list[int], micro: int, accumulation: int, world: int
) -> None:
    source, size = Measured(*sizes), micro * accumulation * world
    found = global_batches(source, size, micro, world, 3)
    expected = stream(source, 3 * size)
    for step, batch in enumerate(found):
        own = expected[step * size :][:size]
        assert sorted(samples(batch)) == sorted(own)
        assert all(one.totals == batch[0].totals and one.cursor == batch[0].cursor for one in batch)
        assert batch[0].totals["weight"] == sum(index for _, index in own)
        passes = [[one.inputs["samples"] for one in batch[step::accumulation]] for step in range(accumulation)]
        assert all(len(one) == micro for ranks in passes for one in ranks)
        for ranks in passes:
            tokens = [int(tokens_of(source, one).sum()) for one in ranks]
            longest = [int(tokens_of(source, one).max()) for one in ranks]
            assert max(tokens) - min(tokens) < max(longest)


def tokens_of(source: Measured, rows: Tensor) -> np.ndarray:
    return np.concatenate([source.lengths(epoch, np.array([index])) for epoch, index in rows.tolist()])


def test_micro_batches_of_a_source_that_knows_lengths_are_alike_and_keep_the_streams_order() -> None:
    source = Measured(100, 100)
    batch = global_batches(source, 64, 8, 2, 2)[1]
    widths = [int(tokens_of(source, one.inputs["samples"]).max()) for one in batch[:4]]
    filled = sum(tokens_of(source, one.inputs["samples"]).sum() for one in batch) / (8 * 2 * sum(widths))
    assert filled > 0.8
    assert widths == sorted(widths, reverse=True)
    assert {epoch for epoch, _ in samples(batch)} == {0, 1}
    assert all(samples([one]) == sorted(samples([one])) for one in batch)


def test_totals_and_cursor_are_those_of_the_whole_global_batch_on_every_rank() -> None:
    first, second = global_batches(Numbers(10), 6, 1, 3, 2)
    assert {(b.totals["weight"], b.totals["sequences"]) for b in first} == {(0 + 1 + 2 + 3 + 4 + 5, 6)}
    assert {b.cursor for b in first} == {Cursor(0, 6, 6)}
    assert {(b.totals["weight"], b.totals["sequences"]) for b in second} == {(6 + 7 + 8 + 9 + 0 + 1, 6)}
    assert {b.cursor for b in second} == {Cursor(1, 2, 12)}


def test_a_cursor_at_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    assert global_batches(Numbers(6), 6, 6, 1, 1)[0][0].cursor == Cursor(1, 0, 6)


def test_a_global_batch_may_span_many_small_epochs() -> None:
    (batch,) = global_batches(Numbers(2, 1), 7, 7, 1, 1)[0]
    assert samples([batch]) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_resume_at_any_cursor_and_world_size_continues_the_stream(world: int) -> None:
    for source in (Numbers(11, 9), Measured(11, 9)):
        whole = global_batches(source, 8, 4, 1, 6)
        for step in range(5):
            resumed = global_batches(source, 8, 2, world, 6 - step - 1, whole[step][-1].cursor)
            found, expected = (
                [samples(batch) if type(source) is Numbers else sorted(samples(batch)) for batch in batches]
                for batches in (resumed, whole[step + 1 :])
            )
            assert found == expected
            assert resumed[-1][-1].cursor == whole[-1][-1].cursor


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_while_collating_stays_one_clean_line(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        next(training_batches(Unreadable(8), BatchLayout(4, 4), Cursor(), workers))
    assert str(caught.value) == "data.path: shard-3 is damaged; prepare the data again"


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(workers: int) -> None:
    before = torch.get_rng_state()
    batches = training_batches(Numbers(8), BatchLayout(4, 4), Cursor(), workers)
    next(batches)
    batches.close()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "expected"),
    [
        (64, None, 1, (32, 2)),
        (64, None, 4, (16, 1)),
        (4096, None, 8, (32, 16)),
        (40, None, 1, (20, 2)),
        (37, None, 1, (1, 37)),
        (64, 8, 2, (8, 4)),
        (1, 1, 1, (1, 1)),
    ],
)
def test_layouts(global_batch: int, micro_batch: int | None, world: int, expected: tuple[int, int]) -> None:
    layout = resolve_layout(global_batch, micro_batch, world)
    assert (layout.micro_batch, layout.accumulation) == expected


@pytest.mark.parametrize(
    ("global_batch", "world", "length", "expected"),
    [
        (1024, 8, 128, (128, 1)),
        (8192, 8, 128, (128, 8)),
        (8192, 8, 512, (32, 32)),
        (4096, 1, 100, (128, 32)),  # the 164 that make 16,384 tokens don't divide
        (256, 8, 128, (32, 1)),
        (8, 1, 32768, (1, 8)),
    ],
)
def test_a_gpus_layout_has_enough_tokens_where_the_batch_leaves_them(
    global_batch: int, world: int, length: int, expected: tuple[int, int]
) -> None:
    layout = resolve_layout(global_batch, None, world, default=default_micro_batch("cuda", length))
    assert (layout.micro_batch, layout.accumulation) == expected
    own = resolve_layout(global_batch, 1, world, default=default_micro_batch("cuda", length))
    assert (own.micro_batch, own.reason) == (1, "train.micro_batch")
    on_cpu = resolve_layout(global_batch, None, world, default=default_micro_batch("cpu", length))
    assert on_cpu == resolve_layout(global_batch, None, world)


@pytest.mark.parametrize(
    ("accelerator", "sequences", "expected"),
    [("cuda", 1, 128), ("cuda", 4, 32), ("cuda", 200, 1), ("cpu", 4, 8), ("cpu", 5, 6), ("cpu", 40, 1)],
)
def test_a_sample_of_several_sequences_counts_as_so_many(accelerator: str, sequences: int, expected: int) -> None:
    default = default_micro_batch(accelerator, 128, sequences)
    assert default.limit == expected
    assert (f"up to {expected} x {sequences} " in default.reason) is (sequences > 1)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "message"),
    [
        (10, None, 4, r"train.global_batch: 10 is not a multiple of 4 rank\(s\); give 8 or 12"),
        (100, 32, 2, r"global_batch: 100 is not a multiple of train.micro_batch 32 x 2 rank\(s\); give 64 or 128"),
        (8, 16, 1, r"train.global_batch: 8 is not a multiple of train.micro_batch 16 x 1 rank\(s\); give 16$"),
    ],
)
def test_a_global_batch_that_does_not_divide_names_the_nearest_that_do(
    global_batch: int, micro_batch: int | None, world: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_layout(global_batch, micro_batch, world)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 7), st.integers(0, 50))
@settings(max_examples=80, deadline=None)
def test_an_evaluation_covers_its_samples_once_with_equal_work_on_every_rank(
    size: int, world: int, micro: int, limit: int
) -> None:
    for source in (Numbers(size), Measured(size)):
        check_evaluation(source, size, world, micro, limit)


def check_evaluation(source: Numbers, size: int, world: int, micro: int, limit: int) -> None:
    ranks = [list(evaluation_batches(source, rank, world, micro, limit)) for rank in range(world)]
    count = min(limit or size, size)
    assert len({len(rank) for rank in ranks}) == 1
    real = [batch for rank in ranks for batch in rank if not batch.dummy]
    assert sorted(samples(real)) == [(0, index) for index in range(count)]
    assert all(batch.totals == {"weight": count * (count - 1) / 2, "sequences": count} for r in ranks for batch in r)
    assert sum(batch.dummy for rank in ranks for batch in rank) < world
    assert all(len(batch.inputs["samples"]) for rank in ranks for batch in rank)


def test_chunks_of_an_evaluation_are_dealt_in_turn() -> None:
    ranks = [list(evaluation_batches(Numbers(9), rank, 2, 2, 0)) for rank in range(2)]
    assert [samples([batch]) for batch in ranks[0]] == [[(0, 0), (0, 1)], [(0, 4), (0, 5)], [(0, 8)]]
    assert [samples([batch]) for batch in ranks[1]] == [[(0, 2), (0, 3)], [(0, 6), (0, 7)], [(0, 0), (0, 1)]]
    assert [batch.dummy for batch in ranks[1]] == [False, False, True]


def test_chunks_of_an_evaluation_come_in_falling_length() -> None:
    source = Measured(50)
    batches = list(evaluation_batches(source, 0, 1, 8, 40))
    lengths = [tokens_of(source, batch.inputs["samples"]) for batch in batches]
    assert all(longer.min() >= shorter.max() for longer, shorter in pairwise(lengths))
    assert [samples([batch]) for batch in batches] == [sorted(samples([batch])) for batch in batches]


@pytest.mark.parametrize("workers", [0, 1])
def test_micro_batches_are_tensors_of_this_process(workers: int) -> None:
    """Sent by value: each tensor in shared memory would be a file for the training process to open."""
    batches = training_batches(Numbers(10), BatchLayout(2, 2), Cursor(), workers)
    batch = next(batches)
    assert all(not tensor.is_shared() for tensor in batch.inputs.values())
    batch.inputs["samples"][0] += 1
    batches.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_micro_batches_are_pinned_for_a_gpu(workers: int) -> None:
    batches = training_batches(Numbers(10), BatchLayout(2, 2), Cursor(), workers, pin=True)
    batch = next(batches)
    assert all(tensor.is_pinned() for tensor in batch.inputs.values())
    assert samples([batch]) == [(0, 0), (0, 1)]
    batches.close()
