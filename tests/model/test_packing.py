from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.model.packing import Packing, pack, spare_rows


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_packing_round_trip_and_mask(lengths: list[int], slack: int) -> None:
    width = max(lengths) + slack
    packing = Packing.from_lengths(torch.tensor(lengths), sum(lengths), width)
    tokens = torch.arange(1.0, sum(lengths) + 1)
    grid = packing.to_grid(tokens)
    rows = tokens.split(lengths)
    expected = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    assert torch.equal(grid, expected)
    assert torch.equal(packing.from_grid(grid, len(tokens)), tokens)
    spare = torch.cat([tokens, torch.full((3,), torch.nan)])[:, None]
    behind = packing.from_grid(packing.to_grid(spare), len(spare))
    assert torch.equal(behind[:, 0], torch.cat([tokens, torch.zeros(3)]))
    assert torch.equal(packing.starts, torch.stack([row[0] for row in rows]).long() - 1)
    if packing.key_mask is not None:
        assert torch.equal(packing.key_mask[:, 0, 0], expected > 0)
    assert (packing.key_mask is None) == all(length == width for length in lengths)


def test_max_length_defaults_to_the_longest() -> None:
    assert Packing.from_lengths(torch.tensor([2, 5, 1]), 8).max_length == 5


def test_matrix_products_meet_few_row_counts() -> None:
    half = torch.empty(0, dtype=torch.bfloat16)
    for low in (1, 100, 600, 3700):
        counts = range(low, 2 * low)
        padded = {rows + spare_rows(rows, half) for rows in counts}
        assert len(padded) <= 64
        assert max(spare_rows(rows, half) / rows for rows in counts) < 1 / 32
    assert spare_rows(4095, half) == 1
    assert spare_rows(4095, half.float()) == spare_rows(4095, half.to("meta")) == 0


def test_gradients_flow_to_the_packed_tokens() -> None:
    packing = Packing.from_lengths(torch.tensor([1, 3]), 4)
    tokens = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.from_grid(packing.to_grid(x).sin(), 6), (tokens,))


def test_pack_keeps_tokens_in_order_with_their_columns(padded: dict[str, Tensor]) -> None:
    packed = pack(**padded)
    assert packed["lengths"].tolist() == [11, 3, 7, 1, 11]
    assert torch.equal(packed["input_ids"][11:14], padded["input_ids"][1, :3])
    assert torch.equal(packed["token_type_ids"][14:21], padded["token_type_ids"][2, :7])
    assert packed["position_ids"][11:22].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0]


def test_pack_without_segments_gives_zeros(padded: dict[str, Tensor]) -> None:
    packed = pack(padded["input_ids"], padded["attention_mask"])
    assert packed["token_type_ids"].shape == packed["input_ids"].shape
    assert not packed["token_type_ids"].any()


def test_pack_refuses_an_empty_sequence() -> None:
    with pytest.raises(AssertionError, match="without tokens"):
        pack(torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]]))
