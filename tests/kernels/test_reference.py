"""The segment table, and where plain torch has an answer of its own: the oracle gives the same."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.kernels import reference
from engine.kernels.segments import CHUNK, Segments
from tests.kernels.cases import STEP, optimizer_buffers


@given(st.lists(st.integers(0, 3 * CHUNK), max_size=6))
def test_chunks_cover_each_segment_once_and_in_order(lengths: list[int]) -> None:
    offsets = [sum(lengths[:index]) + 5 * index for index in range(len(lengths))]
    table = Segments.build(offsets, lengths, [0.0] * len(lengths))
    for index, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        chunks = slice(int(table.first[index]), int(table.first[index + 1]))
        assert table.owner[chunks].tolist() == [index] * (chunks.stop - chunks.start)
        pieces = list(zip(table.begin[chunks].tolist(), table.size[chunks].tolist(), strict=True))
        assert [begin for begin, _ in pieces] == list(range(offset, offset + length, CHUNK))
        assert sum(size for _, size in pieces) == length
        assert all(0 < size <= CHUNK for _, size in pieces)
    assert int(table.first[-1]) == len(table.begin)


def test_a_table_survives_as_tensors() -> None:
    table = Segments.whole(100_000, 0.1)
    again = Segments.from_tensors(table.tensors())
    assert all(torch.equal(a, b) for a, b in zip(table.tensors(), again.tensors(), strict=True))


def test_adamw_equals_torch() -> None:
    buffers = optimizer_buffers(1000, torch.float32)
    p = nn.Parameter(buffers["param"].clone())
    p.grad = buffers["grad"].clone()
    peer = torch.optim.AdamW([p], lr=STEP.lr, eps=STEP.eps, weight_decay=0.1)
    moments = {name: buffers[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    peer.state[p] = {"step": torch.tensor(2.0), **moments}
    peer.step()
    table = Segments.whole(1000, 0.1)
    reference.adamw_step_(*buffers.values(), None, table, STEP, torch.ones(()))
    torch.testing.assert_close(buffers["param"], p.detach(), rtol=1e-6, atol=1e-6)


def test_no_segments_change_nothing_and_have_no_norm() -> None:
    buffers = optimizer_buffers(10, torch.float32)
    before = buffers["param"].clone()
    table = Segments.build([], [], [])
    reference.adamw_step_(*buffers.values(), None, table, STEP, torch.ones(()))
    assert torch.equal(buffers["param"], before)
    assert float(reference.global_norm(buffers["grad"], table)) == 0.0
