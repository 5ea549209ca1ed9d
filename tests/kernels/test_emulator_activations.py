"""Bias and GELU, GeGLU and column sums: the CUDA sources, run by the emulator, agree with float64 in every schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels.cuda import activations
from engine.kernels.cuda.activations import GROUP_ROWS, GROUPS, groups, rows_of_group
from engine.kernels.cuda.kernels import CudaKernels
from engine.kernels.cuda.nvrtc import SOURCES
from tests.cuda_emulator.emulated import SCHEDULES, Emulator, build, emulated_kernels
from tests.kernels.test_emulator import LOW, dtypes, schedules

#: what the polynomials are off by, of GELU for arguments up to 5 and of its slope
GELU_ERROR, SLOPE_ERROR = 5 * 1.1e-6, 7e-6
GUARD = 16
low = pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: str(dtype).removeprefix("torch."))
#: less than a tile of columns and a block of rows; tiles and groups that aren't full; more than one group
shapes = pytest.mark.parametrize(("rows", "width"), [(1, 8), (33, 264), (150, 520)])


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results are NaN until they are written, and lie between elements of NaN, which are so still at the end."""
    buffers: list[Tensor] = []

    def guarded(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size = math.prod(shape) + 2 * GUARD
        buffers.append(like.new_full((size,), math.nan, dtype=dtype or like.dtype))
        return buffers[-1][GUARD:-GUARD].view(shape)

    monkeypatch.setattr(activations, "room", guarded)
    yield
    assert all(bool(edge.isnan().all()) for buffer in buffers for edge in (buffer[:GUARD], buffer[-GUARD:]))


def drawn(rows: int, width: int, dtype: torch.dtype, seed: int, start: int = GUARD) -> Tensor:
    """[rows, width] from the element `start` of a buffer of NaN on."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((start + rows * width + GUARD,), math.nan, dtype=dtype)
    view = buffer[start : start + rows * width].view(rows, width)
    return view.copy_(torch.randn(rows, width, generator=generator) * 2)


def within(measured: Tensor, exact: Tensor, absolute: Tensor | float) -> bool:
    """Whether each number is its exact value, rounded once to its precision, but for an absolute error."""
    rounding = exact.abs() * (torch.finfo(measured.dtype).eps / 2) + torch.finfo(measured.dtype).tiny
    return bool(((measured.double() - exact).abs() <= rounding * 1.01 + absolute).all())


def check_gelu(kernels: Any, rows: int, width: int, dtype: torch.dtype, start: int = GUARD) -> None:
    """Bias and GELU of a bias that starts there, and their gradients, are as near to float64 as the type allows."""
    x, grad = (drawn(rows, width, dtype, seed) for seed in range(2))
    bias = drawn(1, width, dtype, 2, start)[0]
    exact = (x.double() + bias.double()).requires_grad_()
    F.gelu(exact).backward(grad.double())
    assert exact.grad is not None
    out, (grad_x, grad_bias) = kernels.gelu(x, bias), kernels.gelu_backward(grad, x, bias)
    assert within(out, F.gelu(exact.detach()), GELU_ERROR)
    assert within(grad_x, exact.grad, grad.double().abs() * SLOPE_ERROR)
    assert grad_bias.dtype == dtype
    assert within(grad_bias, exact.grad.sum(0), grad.double().abs().sum(0) * (SLOPE_ERROR + 1e-6))


@schedules
@low
@shapes
@pytest.mark.parametrize("start", [GUARD, 3], ids=["aligned", "unaligned"])
def test_bias_and_gelu_agree_with_float64(schedule: str, dtype: torch.dtype, rows: int, width: int, start: int) -> None:
    check_gelu(emulated_kernels(schedule), rows, width, dtype, start)


def check_every_number(kernels: Any, dtype: torch.dtype) -> None:
    """GELU and its slope of each number that the type has."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 32)
    bias = torch.zeros(32, dtype=dtype)
    out, (slope, _) = kernels.gelu(x, bias), kernels.gelu_backward(torch.ones_like(x), x, bias)
    exact = x.double().requires_grad_()
    F.gelu(exact).sum().backward()
    assert exact.grad is not None
    finite = x.isfinite() & (x.abs() < 1e30)
    true = F.gelu(exact.detach())
    assert within(out[finite], true[finite], GELU_ERROR)
    assert within(slope[finite], exact.grad[finite], SLOPE_ERROR)
    assert bool(out[x.isnan()].isnan().all())
    assert bool(slope[x.isnan()].isnan().all())
    assert float(out[x == math.inf]) == math.inf


@low
def test_gelu_and_its_slope_are_right_for_every_number(dtype: torch.dtype) -> None:
    check_every_number(emulated_kernels(), dtype)


def gated(x: Tensor) -> Tensor:
    """transformers' ModernBertMLP between its products."""
    activated, gate = x.chunk(2, dim=-1)
    return F.gelu(activated) * gate


def check_geglu(kernels: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    """GeGLU and its gradient are as near to float64 as the type allows."""
    x, grad = drawn(rows, 2 * width, dtype, 0), drawn(rows, width, dtype, 1)
    exact = x.double().requires_grad_()
    gated(exact).backward(grad.double())
    assert exact.grad is not None
    out, grad_x = kernels.geglu(x), kernels.geglu_backward(grad, x)
    gate = x[:, width:].double().abs()
    assert within(out, gated(exact.detach()), gate * GELU_ERROR)
    allowed = grad.double().abs()
    assert within(grad_x[:, :width], exact.grad[:, :width], allowed * gate * SLOPE_ERROR)
    assert within(grad_x[:, width:], exact.grad[:, width:], allowed * GELU_ERROR)


@schedules
@low
@shapes
def test_geglu_agrees_with_float64(schedule: str, dtype: torch.dtype, rows: int, width: int) -> None:
    check_geglu(emulated_kernels(schedule), rows, width, dtype)


def check_column_sum(kernels: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    """Sums over rows, in fp32 and rounded once to the type of what is summed, agree with float64."""
    x = drawn(rows, width, dtype, 0)
    for wanted in (torch.float32, dtype):
        total = kernels.column_sum(x, wanted)
        assert total.dtype == wanted
        assert within(total, x.double().sum(0), x.double().abs().sum(0) * 1e-6)


@schedules
@dtypes
@shapes
def test_column_sums_agree_with_float64(schedule: str, dtype: torch.dtype, rows: int, width: int) -> None:
    check_column_sum(emulated_kernels(schedule), rows, width, dtype)


def test_sums_have_the_same_bits_in_every_schedule() -> None:
    x, grad, bias = drawn(1000, 40, torch.bfloat16, 0), drawn(1000, 40, torch.bfloat16, 1), torch.ones(40).bfloat16()
    sums = set()
    for schedule in SCHEDULES:
        kernels = emulated_kernels(schedule)
        pair = kernels.gelu_backward(grad, x, bias)[1], kernels.column_sum(x, torch.float32)
        sums.add(tuple(torch.cat(pair).tolist()))
    assert len(sums) == 1


@pytest.mark.parametrize("rows", [0, 1, GROUP_ROWS, GROUP_ROWS + 1, 4096, 16384, 10**6])
def test_rows_are_summed_in_few_groups_that_cover_them(rows: int) -> None:
    count, size = groups(rows), rows_of_group(rows)
    assert count <= min(GROUPS, -(-rows // GROUP_ROWS))
    assert (count - 1) * size < rows <= count * size or rows == count == 0


def test_no_rows_sum_to_zero() -> None:
    kernels, none, bias = emulated_kernels(), torch.empty(0, 16).bfloat16(), torch.zeros(16).bfloat16()
    assert kernels.column_sum(none, torch.bfloat16).tolist() == [0.0] * 16
    assert kernels.gelu(none, bias).shape == (0, 16)
    assert kernels.gelu_backward(none, none, bias)[1].tolist() == [0.0] * 16
    assert kernels.geglu(none).shape == (0, 8)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stays_in_its_row_and_column(bad: float) -> None:
    x, grad, bias = torch.ones(70, 16).bfloat16(), torch.ones(70, 16).bfloat16(), torch.zeros(16).bfloat16()
    grad[65, 3] = bad
    grad_x, grad_bias = emulated_kernels().gelu_backward(grad, x, bias)
    assert grad_x.isfinite().logical_not().nonzero().tolist() == [[65, 3]]
    assert grad_bias.isfinite().logical_not().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("start", [GUARD, 3], ids=["aligned", "unaligned"])
def test_a_gradient_that_is_strided_or_unaligned_is_read_right(start: int) -> None:
    kernels, dtype = emulated_kernels(), torch.bfloat16
    x, grad = drawn(9, 16, dtype, 0), drawn(9, 16, dtype, 1, start)
    bias, shifted = torch.zeros(16, dtype=dtype), drawn(9, 32, dtype, 2, start)
    for odd in (grad, grad.t().contiguous().t(), grad.flip(0)):
        grad_x, grad_bias = kernels.gelu_backward(odd, x, bias)
        true_x, true_bias = kernels.gelu_backward(odd.contiguous().clone(), x, bias)
        assert grad_x.equal(true_x)
        assert grad_bias.equal(true_bias)
    assert kernels.geglu(shifted).equal(kernels.geglu(shifted.clone()))
    part = shifted[:, 5:21]
    assert kernels.column_sum(part, dtype).equal(kernels.column_sum(part.clone(), dtype))


def test_launches_are_few() -> None:
    emulator, launched = Emulator(build(SOURCES)), []

    def counting(kernel: str, *arguments: Any) -> None:
        launched.append(kernel)
        emulator(kernel, *arguments)

    kernels, x, bias = CudaKernels(counting), drawn(70, 16, torch.float16, 0), torch.zeros(16).half()
    for run, expected in (
        (lambda: kernels.gelu(x, bias), ["bias_gelu<fp16, 256>"]),
        (lambda: kernels.gelu_backward(x, x, bias), ["bias_gelu_backward<fp16, 256>", "sum_partials<fp16, 1024>"]),
        (lambda: kernels.geglu(x), ["geglu<fp16, 256>"]),
        (lambda: kernels.geglu_backward(x[:, :8], x), ["geglu_backward<fp16, 256>"]),
        (lambda: kernels.column_sum(x, torch.float32), ["column_sum<fp16, 256>", "sum_partials<float, 1024>"]),
    ):
        launched.clear()
        run()
        assert launched == expected
