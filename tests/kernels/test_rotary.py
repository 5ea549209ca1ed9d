"""Attention with rotary positions on CPUs, in windows and to whole sequences, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu
from engine.kernels.cache import cache_folder
from engine.kernels.cpu import library as cpu_library
from engine.kernels.layers import rotary_attention
from engine.kernels.reference import dropout_factors, hash32
from engine.kernels.terms import Dropout, Sequences, Window
from engine.model.modernbert.rotary import Rotation
from tests.kernels.test_cpu import MACHINES

#: around the edges of the windows below, and far beyond them
LENGTHS = [1, 2, 63, 64, 65, 128, 129, 300]
WINDOWS: dict[str, Window] = {"all": (-1, -1), "narrow": (3, 3), "wide": (64, 64)}

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


@pytest.fixture(params=MACHINES, ids=lambda flags: " ".join(flags) or "default")
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of each instruction set that this machine has."""
    lib = cpu_library.load(cpu_library.build(request.param, cache_folder()))
    monkeypatch.setattr(cpu_library, "library", lambda: lib)


def packed(lengths: list[int], width: int) -> tuple[Sequences, Rotation]:
    sequences = Sequences.of(torch.tensor(lengths), sum(lengths), max(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return sequences, Rotation.of(positions, width, 10_000.0)


def plain(
    projected: Tensor, rotation: Rotation, lengths: list[int], heads: int, window: Window, dropout: Dropout
) -> Tensor:
    """The same sequence by sequence in the type of `projected`."""
    exact = Rotation(rotation.cos.to(projected.dtype), rotation.sin.to(projected.dtype))
    query, key, value = projected[: sum(lengths)].unflatten(-1, (3, heads, -1)).unbind(1)
    query, key = turned(query, exact), turned(key, exact)
    contexts, start = [], 0
    for length in lengths:
        rows = torch.arange(start, start + length)
        asking, asked, read = (states[rows].transpose(0, 1) for states in (query, key, value))
        scores = asking @ asked.mT / query.shape[-1] ** 0.5
        far = (torch.arange(length)[:, None] - torch.arange(length)).abs() > window[0]
        probabilities = scores.masked_fill(far & (window[0] >= 0), -torch.inf).softmax(-1)
        seeds = [int(hash32(torch.tensor(dropout.seed + head))) for head in range(heads)]
        kept = [dropout_factors(Dropout(dropout.probability, seed), rows, length) for seed in seeds]
        contexts.append(((probabilities * torch.stack(kept)) @ read).transpose(0, 1).flatten(1))
        start += length
    return torch.cat(contexts)


def turned(states: Tensor, rotation: Rotation) -> Tensor:
    first, second = states.chunk(2, -1)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def apart(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


def check(
    lengths: list[int], heads: int, width: int, window: Window, dtype: torch.dtype, bound: float, probability: float
) -> None:
    """Contexts and gradients; rows behind the last token, of no sequence, get zeros."""
    tokens, spare = sum(lengths), 3
    sequences, rotation = packed(lengths, width)
    generator = torch.Generator().manual_seed(width)
    projected = torch.randn(tokens + spare, 3 * heads * width, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(tokens + spare, heads * width, generator=generator).to(dtype)
    torch.manual_seed(5)
    seed = int(torch.randint(2**32, ()))
    torch.manual_seed(5)
    places = (rotation.cos, rotation.sin, sequences, heads)
    context = rotary_attention(cpu, projected, *places, dropout=probability, window=window)
    context.backward(grad)
    exact = projected.detach().double().requires_grad_()
    expected = plain(exact, rotation, lengths, heads, window, Dropout(probability, seed))
    expected.backward(grad[:tokens].double())
    assert projected.grad is not None
    assert exact.grad is not None
    assert apart(context[:tokens], expected) < bound
    parts = zip(projected.grad.chunk(3, 1), exact.grad.chunk(3, 1), strict=True)
    assert max(apart(ours[:tokens], right[:tokens]) for ours, right in parts) < bound
    assert not context[tokens:].any()
    assert not projected.grad[tokens:].any()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 32), (2, 48), (2, 64)])
def test_contexts_and_gradients_are_as_exact_as_fp32(built: None, heads: int, width: int, window: str) -> None:
    check(LENGTHS, heads, width, WINDOWS[window], torch.float32, 1e-6, 0.0)


@pytest.mark.parametrize("window", WINDOWS)
def test_contexts_and_gradients_are_rounded_to_bf16_once(window: str) -> None:
    check(LENGTHS, 2, 32, WINDOWS[window], torch.bfloat16, 3e-3, 0.0)


@pytest.mark.parametrize("window", WINDOWS)
def test_dropped_probabilities(built: None, window: str) -> None:
    check([1, 40, 150], 2, 32, WINDOWS[window], torch.float32, 1e-6, 0.25)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_tokens_ask(share: float, window: str) -> None:
    """They get what they would get if all asked; those that ask nothing give their queries no gradient."""
    sequences, rotation = packed(LENGTHS, 32)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(sum(LENGTHS) + 3, 3 * 64, generator=generator)
    read = (torch.rand(sum(LENGTHS), generator=generator) < share).nonzero().flatten()
    grad = torch.randn(len(read), 64, generator=generator)
    results = []
    for asking in (read, None):
        projected = values.clone().requires_grad_()
        places = (rotation.cos, rotation.sin, sequences, 2)
        context = rotary_attention(cpu, projected, *places, read=asking, window=WINDOWS[window])
        context = context if asking is not None else context[read]
        context.backward(grad)
        results.append((context.detach(), projected.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)


def test_long_sequences_keep_fp32_s_precision() -> None:
    check([2000], 1, 64, WINDOWS["all"], torch.float32, 1e-6, 0.0)


@pytest.mark.parametrize("window", WINDOWS)
def test_results_have_the_same_bits_for_any_number_of_threads(window: str) -> None:
    sequences, rotation = packed(LENGTHS, 32)
    values = torch.randn(sum(LENGTHS), 3 * 64, generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            projected = values.clone().requires_grad_()
            context = rotary_attention(cpu, projected, rotation.cos, rotation.sin, sequences, 2, window=WINDOWS[window])
            context.backward(values[:, :64])
            assert projected.grad is not None
            results.append(torch.cat([context.detach(), projected.grad], 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_scores_far_apart_do_not_overflow() -> None:
    sequences, rotation = packed([70], 16)
    projected = torch.randn(70, 48, generator=torch.Generator().manual_seed(1)).mul(1e3).requires_grad_()
    context = rotary_attention(cpu, projected, rotation.cos, rotation.sin, sequences, 1, window=(8, 8))
    context.sum().backward()
    assert bool(context.isfinite().all())
    assert projected.grad is not None
    assert bool(projected.grad.isfinite().all())


def test_windows_that_are_not_centred_are_refused() -> None:
    sequences, rotation = packed([4], 16)
    with pytest.raises(AssertionError, match="middle"):
        rotary_attention(cpu, torch.zeros(4, 48), rotation.cos, rotation.sin, sequences, 1, window=(2, 3))
