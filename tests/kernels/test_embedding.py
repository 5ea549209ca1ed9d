"""An embedding whose gradient joins that of the decoder that shares its weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels.cpu import add_rows, available
from engine.kernels.embedding import TiedGradient

needs_kernels = pytest.mark.skipif(not available(), reason="no C++ compiler")
VOCABULARY, WIDTH = 23, 40


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(VOCABULARY, WIDTH, generator=generator).bfloat16().requires_grad_()


def loss(weight: Tensor, ids: Tensor, tied: TiedGradient | None) -> Tensor:
    """Both uses of the weight."""
    lookup = F.embedding(ids, weight, 0) if tied is None else tied.embedding(ids, weight, 0)
    return (lookup @ (weight if tied is None else tied.decoder(weight)).t()).square().sum()


def tokens(count: int = 200) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(2))


@needs_kernels
def test_the_gradient_is_that_of_both_uses(weight: Tensor) -> None:
    exact = weight.detach().double().requires_grad_()
    loss(exact, tokens(), None).backward()
    loss(weight, tokens(), TiedGradient()).backward()
    assert weight.grad is not None
    assert exact.grad is not None
    assert float((weight.grad.double() - exact.grad).norm() / exact.grad.norm()) < 6e-3
    assert "Lookup" in type(TiedGradient().embedding(tokens(), weight, 0).grad_fn).__name__


@needs_kernels
def test_passes_do_not_mix(weight: Tensor) -> None:
    """Two forward passes before their backward passes, and gradients that add up."""
    alone = [torch.autograd.grad(loss(weight, ids, TiedGradient()), weight)[0] for ids in (tokens(), tokens(9))]
    first, second = loss(weight, tokens(), TiedGradient()), loss(weight, tokens(9), TiedGradient())
    first.backward()
    second.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, alone[0] + alone[1])


@needs_kernels
def test_a_decoder_without_a_gradient_leaves_the_embeddings_own(weight: Tensor) -> None:
    ids = tokens()
    TiedGradient().embedding(ids, weight, 0).float().sum().backward()
    counts = torch.bincount(ids, minlength=VOCABULARY).float()
    counts[0] = 0
    assert weight.grad is not None
    assert torch.equal(weight.grad.float(), counts[:, None].expand(-1, WIDTH))


def test_plain_torch_takes_what_the_kernels_do_not(weight: Tensor) -> None:
    sharded = weight.detach().clone().requires_grad_()
    sharded.ds_id = 1  # type: ignore[attr-defined]
    for other in (weight.detach(), weight.detach().float().requires_grad_(), sharded):
        tied = TiedGradient()
        found = tied.embedding(tokens(), other, 0)
        assert "Lookup" not in str(found.grad_fn)
        assert torch.equal(found, other[tokens()])
        assert tied.decoder(other) is other


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("ids", [[], [3], [3] * 50, list(range(VOCABULARY)) * 3, [0, 0, 7, 0]])
def test_rows_of_one_id_are_summed_in_fp32(ids: list[int], threads: int) -> None:
    generator = torch.Generator().manual_seed(4)
    table, values = (torch.randn(n, WIDTH, generator=generator).bfloat16() for n in (VOCABULARY, len(ids)))
    expected = table.float().index_add(0, torch.tensor(ids).long(), values.float())
    expected[0] = table[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        add_rows(table, torch.tensor(ids).long(), values, left_out=0)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(table.float(), expected, rtol=2.0**-8, atol=1e-6)
