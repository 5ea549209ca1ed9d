"""Attention of packed sequences as an operator: its plain version against torch's on the padded grid, and its calls of
flash attention, recorded on fake tensors of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F  # noqa: N812

from engine.kernels import cuda, reference
from engine.kernels.layers import fused_attention
from engine.kernels.terms import EVERYWHERE, Sequences, Window
from engine.kernels.varlen import varlen_attention, varlen_attention_backward
from engine.model.packing import Packing
from tests.kernels.cases import error, packed
from tests.kernels.recorder import Recorder

HEADS, WIDTH = 2, 24
LENGTHS = [[5, 13, 1, 8], [9], [1], [4, 4, 4]]
#: fp32 sums in another order; bf16 results are rounded once, their gradients from rounded ones
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def on_grid(
    tensors: list[Tensor], lengths: list[int], read: Tensor | None, window: Window = EVERYWHERE, rows: int = 0
) -> Tensor:
    """What torch computes on the padded grid; of the tokens `read`."""
    packing = Packing.from_lengths(torch.tensor(lengths), sum(lengths), max(lengths))
    grids = [packing.to_grid(tensor).unflatten(2, (HEADS, -1)).transpose(1, 2) for tensor in tensors]
    place = torch.arange(packing.max_length)
    before = place[:, None] - place
    left, right = (packing.max_length if side < 0 else side for side in window)
    seen = (before <= left) & (-before <= right)
    seen = seen if packing.key_mask is None else seen & packing.key_mask | torch.eye(len(place)).bool()
    context = F.scaled_dot_product_attention(*grids, attn_mask=seen)
    states = packing.from_grid(context.transpose(1, 2).flatten(2), sum(lengths))
    return states if read is None else states[read]


def drawn(rows: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS * WIDTH, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("window", [EVERYWHERE, (2, 2), (0, 3), (-1, 0), (64, 64)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_context_and_gradients_are_those_of_the_grid(lengths: list[int], window: Window, dtype: torch.dtype) -> None:
    tensors = [drawn(sum(lengths), dtype, seed) for seed in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    grad = drawn(sum(lengths), dtype, 4).detach()
    context = fused_attention(reference, *tensors, packed(lengths), HEADS, window=window)
    expected = on_grid(exact, lengths, None, window)
    context.backward(grad)
    expected.backward(grad.double())
    assert (context.dtype, error(context, expected) <= BOUNDS[dtype]) == (dtype, True)
    for mine, true in zip(tensors, exact, strict=True):
        assert mine.grad is not None
        assert true.grad is not None
        assert error(mine.grad, true.grad) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(
    ("lengths", "read"), [([5, 13, 1, 8], [0, 4, 5, 17, 18, 19]), ([5, 3], [6]), ([4, 4], []), ([1], [0])], ids=str
)
def test_some_tokens_ask_and_rows_behind_get_and_give_nothing(
    lengths: list[int], read: list[int], dtype: torch.dtype
) -> None:
    """A sequence may have no query. The rows behind hold NaN: nothing may read them."""
    asking, tokens = torch.tensor(read, dtype=torch.int64), sum(lengths)
    full = [drawn(tokens, dtype, seed) for seed in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in full]
    used = (full[0][asking], full[1], full[2])
    tensors = [F.pad(t.detach(), (0, 0, 0, 3), value=torch.nan).requires_grad_() for t in used]
    grad = F.pad(drawn(len(read), dtype, 4).detach(), (0, 0, 0, 3), value=torch.nan)
    context = fused_attention(reference, *tensors, packed(lengths, asking), HEADS)
    context.backward(grad)
    expected = on_grid(exact, lengths, asking)
    expected.backward(grad[: len(read)].double())
    assert torch.equal(context[len(read) :], torch.zeros_like(context[len(read) :]))
    assert error(context[: len(read)], expected) <= BOUNDS[dtype]
    rows = (len(read), tokens, tokens)
    for mine, count, true, place in zip(tensors, rows, exact, (asking, slice(None), slice(None)), strict=True):
        assert mine.grad is not None
        assert true.grad is not None
        assert not mine.grad[count:].any()
        assert error(mine.grad[:count], true.grad[place]) <= BOUNDS[dtype]


def arguments(sequences: Sequences, dropout: float = 0.0, window: Window = EVERYWHERE) -> tuple[Any, ...]:
    bounds = (sequences.query_bounds32, sequences.bounds32, sequences.longest, sequences.longest)
    return (*bounds, HEADS, dropout, *window)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_the_derivatives(dropout: float) -> None:
    """In fp64, by differences; the same random numbers drop the same."""
    asking = torch.tensor([0, 2, 6])
    tensors = [drawn(rows, torch.float64, seed) for seed, rows in enumerate((3, 7, 7))]

    def attend(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        context: Tensor = varlen_attention(*tensors, *arguments(packed([3, 1, 3], asking), dropout))[0]
        return context

    assert torch.autograd.gradcheck(attend, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_are_registered_soundly(dtype: torch.dtype) -> None:
    tensors = [drawn(6, dtype, seed) for seed in range(3)]
    sizes = arguments(packed([2, 4]), window=(1, 1))
    opcheck(varlen_attention, (*tensors, *sizes))
    kept = [tensor.detach() for tensor in varlen_attention(*tensors, *sizes)]
    plain = [tensor.detach() for tensor in tensors]
    opcheck(varlen_attention_backward, (plain[0], *plain, *kept, *sizes))


def test_dropout_follows_torchs_generator() -> None:
    tensors = [drawn(40, torch.float32, seed).detach() for seed in range(3)]
    draw = lambda: fused_attention(reference, *tensors, packed([30, 10]), HEADS, dropout=0.5)  # noqa: E731
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    fused_attention(reference, *tensors, packed([30, 10]), HEADS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_window_needs_every_token_to_ask() -> None:
    tensors = [drawn(rows, torch.float32, rows) for rows in (2, 5, 5)]
    for kernels in (reference, cuda):
        with pytest.raises(AssertionError, match="every token asks"):
            kernels.varlen_attention(*tensors, *arguments(packed([2, 3], torch.tensor([0, 3])), window=(1, 1)))


def test_bounds_are_made_once_and_say_who_asks() -> None:
    sequences = packed([3, 1, 4])
    assert sequences.starts.tolist() == [0, 3, 4]
    assert sequences.lengths.tolist() == sequences.query_lengths.tolist() == [3, 1, 4]
    assert sequences.query_bounds32 is sequences.bounds32
    some = sequences.asking(torch.tensor([1, 2, 5, 6, 7]))
    assert some.query_starts.tolist() == [0, 2, 2]
    assert some.query_lengths.tolist() == [2, 0, 3]
    assert (some.queries, some.tokens, some.longest) == (5, 8, 4)
    assert some.query_bounds32.dtype == some.bounds32.dtype == torch.int32


@pytest.fixture
def gpu() -> Any:
    """Tensors of a GPU without data."""
    with FakeTensorMode():
        yield torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dropout", "window"), [(0.1, EVERYWHERE), (0.0, (64, 64))])
def test_what_is_asked_of_flash_attention(
    gpu: torch.device, dtype: torch.dtype, dropout: float, window: Window
) -> None:
    """Heads apart, bounds in int32, no look at the device; rows of a wider tensor are taken as they lie."""
    lengths, longest, tokens = torch.ones(4, dtype=torch.int64, device=gpu), 128, 300
    wide = torch.empty(tokens, 3 * HEADS * WIDTH, dtype=dtype, device=gpu)
    query, key, value = wide.chunk(3, 1)
    with Recorder() as recorder:
        sizes = arguments(Sequences.of(lengths, tokens, longest), dropout, window)
        kept = cuda.varlen_attention(query, key, value, *sizes)
        grad = torch.empty(tokens, HEADS * WIDTH, dtype=dtype, device=gpu)
        gradients = cuda.varlen_attention_backward(grad, query, key, value, *kept, *sizes)
    ((forward, options),) = recorder.calls_of("_flash_attention_forward")
    ((backward, options_backward),) = recorder.calls_of("_flash_attention_backward")
    for states in (*forward[:3], *backward[:5]):
        assert (states.shape, states.dtype, states.stride(2)) == ((tokens, HEADS, WIDTH), dtype, 1)
    assert [states.stride(0) for states in forward[:3]] == [3 * HEADS * WIDTH] * 3
    for bounds in (*forward[3:5], *backward[6:8]):
        assert (bounds.shape, bounds.dtype, bounds.device.type) == ((5,), torch.int32, "cuda")
        assert bounds.is_contiguous()
    assert forward[5:] == (longest, longest, dropout, False, False)
    assert backward[8:12] == (longest, longest, dropout, False)
    assert all(passed is made for passed, made in zip(backward[12:], kept[2:], strict=True))
    assert options == options_backward == {"window_size_left": window[0], "window_size_right": window[1]}
    assert [(g.shape, g.dtype) for g in (kept[0], *gradients)] == [((tokens, HEADS * WIDTH), dtype)] * 4
    assert recorder.waits == []
    assert recorder.launches().count("_to_copy") == 1  # the bounds in int32


def test_the_fakes_are_those_of_flash_attention(gpu: torch.device) -> None:
    """The operator's shapes while a graph is traced are those of the call that will run."""
    tensors = [torch.empty(rows, HEADS * WIDTH, dtype=torch.bfloat16, device=gpu) for rows in (3, 8, 8)]
    sequences = Sequences.of(torch.ones(2, dtype=torch.int64, device=gpu), 8, 6)
    sizes = arguments(sequences.asking(torch.ones(3, dtype=torch.int64, device=gpu)))
    ours, flash = varlen_attention(*tensors, *sizes), cuda.varlen_attention(*tensors, *sizes)
    found = varlen_attention_backward(ours[0], *tensors, *ours, *sizes)
    true = cuda.varlen_attention_backward(ours[0], *tensors, *flash, *sizes)
    for fake, called in zip((*ours, *found), (*flash, *true), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (called.shape, called.dtype, called.stride())


def test_a_layers_attention_launches_one_operator_each_way() -> None:
    """What else it costs is made once for all layers: the bounds. On the device of shapes, which has gradients."""
    sequences = Sequences.of(torch.ones(4, dtype=torch.int64, device="meta"), 60, 32)
    tensors = [
        torch.empty(60, HEADS * WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)
    ]
    fused_attention(cuda, *tensors, sequences, HEADS, dropout=0.1)
    with Recorder() as recorder:
        context = fused_attention(cuda, *tensors, sequences, HEADS, dropout=0.1)
        context.backward(torch.empty_like(context))
    assert recorder.launches() == ["varlen_attention", "varlen_attention_backward"]
    assert all(tensor.grad is not None for tensor in tensors)
