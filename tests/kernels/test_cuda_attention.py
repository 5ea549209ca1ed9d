"""Flash attention of packed sequences on a GPU: against float64, what dropout drops, its bits, and without waiting.

Skipped where there is no GPU; the calls are recorded on fake tensors everywhere, in test_varlen.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import cuda
from engine.kernels.cuda.selfcheck import disagreement
from engine.kernels.layers import fused_attention
from engine.kernels.terms import EVERYWHERE, Sequences, Window
from tests.kernels.cases import error
from tests.kernels.test_varlen import on_grid

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.lacks_flash(torch.device("cuda", 0)) is not None,
    reason="no GPU with flash attention: its calls are only recorded here",
)
DTYPES = [torch.float16, torch.bfloat16]
#: that of test_varlen's grid
HEADS = 2
#: largest error in roundings of the type, relative to the largest value or 1
ROUNDINGS = 4


def drawn(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS * width, generator=generator).to("cuda", dtype).requires_grad_()


def packed(lengths: list[int], read: Tensor | None = None) -> Sequences:
    sequences = Sequences.of(torch.tensor(lengths).cuda(), sum(lengths), max(lengths))
    return sequences if read is None else sequences.asking(read)


def apart(ours: Tensor | None, exact: Tensor | None) -> float:
    assert ours is not None
    assert exact is not None
    return error(ours.cpu(), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 32, 64, 128, 256])
@pytest.mark.parametrize("window", [EVERYWHERE, (64, 64), (0, 3)], ids=str)
@pytest.mark.parametrize("lengths", [[5, 130, 1, 64], [1], [512, 3], [300]], ids=str)
def test_context_and_gradients_agree_with_float64(
    lengths: list[int], window: Window, width: int, dtype: torch.dtype
) -> None:
    tensors = [drawn(sum(lengths), width, dtype, seed) for seed in range(3)]
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in tensors]
    grad = drawn(sum(lengths), width, dtype, 4).detach()
    context = fused_attention(cuda, *tensors, packed(lengths), HEADS, window=window)
    expected = on_grid(exact, lengths, None, window)
    context.backward(grad)
    expected.backward(grad.double().cpu())
    bound = ROUNDINGS * torch.finfo(dtype).eps
    assert apart(context, expected) <= bound
    for mine, true in zip(tensors, exact, strict=True):
        assert apart(mine.grad, true.grad) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "read"), [([5, 130, 1, 64], [0, 4, 5, 40, 134, 136]), ([70, 200], [70, 71, 269]), ([4, 4], [])], ids=str
)
def test_some_tokens_ask_and_rows_behind_are_zero(lengths: list[int], read: list[int], dtype: torch.dtype) -> None:
    """Also where a sequence has no query, whose keys' gradients must be zeros and not what memory held."""
    asking, tokens = torch.tensor(read, dtype=torch.int64, device="cuda"), sum(lengths)
    query, key, value = drawn(len(read) + 3, 64, dtype, 0), *(drawn(tokens + 3, 64, dtype, seed) for seed in (1, 2))
    context = fused_attention(cuda, query, key, value, packed(lengths, asking), HEADS)
    grad = drawn(len(read) + 3, 64, dtype, 4).detach()
    context.backward(grad)
    exact = [tensor.detach()[:tokens].double().cpu().requires_grad_() for tensor in (key, value)]
    full = torch.zeros(tokens, HEADS * 64, dtype=torch.float64)
    full[read] = query.detach()[: len(read)].double().cpu()
    full.requires_grad_()
    expected = on_grid([full, *exact], lengths, asking.cpu())
    expected.backward(grad[: len(read)].double().cpu())
    assert full.grad is not None
    bound = ROUNDINGS * torch.finfo(dtype).eps
    assert not context[len(read) :].any()
    assert apart(context[: len(read)], expected) <= bound
    wanted = (full.grad[read], *(tensor.grad for tensor in exact))
    for mine, true, count in zip((query, key, value), wanted, (len(read), tokens, tokens), strict=True):
        assert mine.grad is not None
        assert not mine.grad[count:].any()
        assert apart(mine.grad[:count], true) <= bound


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_drops_its_share_anew_each_time_and_keeps_the_mean(probability: float) -> None:
    """Unit vectors as values show the probabilities that were kept. Steps of 1 / 256, so 0.1 drops up to 0.104."""
    torch.cuda.manual_seed(0)
    count = 64
    zeros = torch.zeros(count * 50, HEADS * count, dtype=torch.bfloat16, device="cuda")
    units = torch.eye(count, dtype=torch.bfloat16, device="cuda").repeat(50, HEADS)
    sequences = packed([count] * 50)
    first, second = (fused_attention(cuda, zeros, zeros, units, sequences, HEADS, dropout=probability) for _ in "ab")
    dropped = (first == 0).double()
    assert abs(float(dropped.mean()) - probability) < 0.006
    assert abs(float(first.double().sum(1).mean()) / HEADS - 1.0) < 0.01
    together = float(((first == 0) & (second == 0)).double().mean())
    assert abs(together - probability**2) < 0.006
    torch.cuda.manual_seed(0)
    assert torch.equal(fused_attention(cuda, zeros, zeros, units, sequences, HEADS, dropout=probability), first)


def gradients(dropout: float) -> list[Tensor]:
    torch.cuda.manual_seed(3)
    tensors = [drawn(3000, 64, torch.bfloat16, seed) for seed in range(3)]
    context = fused_attention(cuda, *tensors, packed([512] * 5 + [440]), HEADS, dropout=dropout)
    context.backward(torch.ones_like(context))
    return [context.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


def test_the_deterministic_mode_repeats_every_bit() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(0.1)
        for _ in range(5):
            assert all(map(torch.equal, first, gradients(0.1)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_host_never_waits() -> None:
    lengths, read = torch.tensor([5, 130, 17]).cuda(), torch.tensor([0, 5, 7, 135]).cuda()
    tensors = [drawn(rows, 64, torch.bfloat16, rows) for rows in (4, 152, 152)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sequences = Sequences.of(lengths, 152, 130).asking(read)
        context = fused_attention(cuda, *tensors, sequences, HEADS, dropout=0.1)
        context.backward(torch.ones_like(context))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_at_the_start_of_a_run_passes() -> None:
    device: Any = torch.device("cuda", torch.cuda.current_device())
    state = torch.cuda.get_rng_state()
    assert disagreement(cuda, device, "attention") is None
    assert torch.equal(torch.cuda.get_rng_state(), state)
