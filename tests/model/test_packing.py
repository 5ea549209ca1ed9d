from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.model.packing import Packing, pack


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_packing_round_trip_and_mask(lengths: list[int], slack: int) -> None:
    width = max(lengths) + slack
    packing = Packing.from_lengths(torch.tensor(lengths), sum(lengths), width)
    tokens = torch.arange(1.0, sum(lengths) + 1)
    grid = packing.to_grid(tokens)
    rows = tokens.split(lengths)
    expected = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    assert torch.equal(grid, expected)
    assert torch.equal(packing.from_grid(grid), tokens)
    assert torch.equal(packing.starts, torch.stack([row[0] for row in rows]).long() - 1)
    if packing.key_mask is not None:
        assert torch.equal(packing.key_mask[:, 0, 0], expected > 0)
    assert (packing.key_mask is None) == all(length == width for length in lengths)


def test_max_length_defaults_to_the_longest() -> None:
    assert Packing.from_lengths(torch.tensor([2, 5, 1]), 8).max_length == 5


def test_gradients_flow_to_the_packed_tokens() -> None:
    packing = Packing.from_lengths(torch.tensor([1, 3]), 4)
    tokens = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.from_grid(packing.to_grid(x).sin()), (tokens,))


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
