"""The CUDA kernels of bias and GELU, GeGLU and sums over rows on a GPU: against float64, in their bits, on torch's
streams, and through autograd without waiting.

Those are skipped where there is no GPU; the emulator's tests run the same cases on the same sources everywhere. What
the host gives a launch, at the sizes of real models, is read from tensors without data.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels import cuda, dispatch
from engine.kernels.cuda.activations import GROUPS, rows_of_group
from engine.kernels.cuda.arguments import TYPES, WARP
from engine.kernels.cuda.kernels import CudaKernels
from engine.kernels.linear import geglu, linear, linear_gelu
from tests.kernels.test_emulator import LOW
from tests.kernels.test_emulator_activations import (
    GUARD,
    check_column_sum,
    check_every_number,
    check_geglu,
    check_gelu,
    drawn,
    guards,
)

__all__ = ["guards"]  # in use in each test here too: results lie between elements that stay NaN

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: the CUDA kernels are only compiled and emulated here"
)
low = pytest.mark.parametrize("dtype", LOW, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
#: one row; groups and tiles that aren't full; the width of base; as many groups as there may be
shapes = pytest.mark.parametrize(("rows", "width"), [(1, 8), (1003, 264), (5000, 3072), (16384, 264)])


class OnGpu:
    """The kernels for tensors of the CPU; a vector's copy on the GPU starts `offset` elements behind 16 bytes."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    def placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        offset = self.offset if value.ndim == 1 else 0
        buffer = torch.empty(value.numel() + offset, dtype=value.dtype, device="cuda")
        return buffer[offset:].view(value.shape).copy_(value)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            found = getattr(cuda, name)(*map(self.placed, given))
            return tuple(made.cpu() for made in found) if isinstance(found, tuple) else found.cpu()

        return run


@needs_gpu
@low
@shapes
@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "unaligned"])
def test_bias_and_gelu_agree_with_float64(dtype: torch.dtype, rows: int, width: int, offset: int) -> None:
    check_gelu(OnGpu(offset), rows, width, dtype)


@needs_gpu
@low
def test_gelu_and_its_slope_are_right_for_every_number(dtype: torch.dtype) -> None:
    check_every_number(OnGpu(), dtype)


@needs_gpu
@low
@shapes
def test_geglu_agrees_with_float64(dtype: torch.dtype, rows: int, width: int) -> None:
    check_geglu(OnGpu(), rows, width, dtype)


@needs_gpu
@dtypes
@shapes
def test_column_sums_agree_with_float64(dtype: torch.dtype, rows: int, width: int) -> None:
    check_column_sum(OnGpu(), rows, width, dtype)


@needs_gpu
@low
@pytest.mark.parametrize("start", [GUARD, 3], ids=["aligned", "unaligned"])
def test_a_gradient_that_is_strided_or_unaligned_is_read_right(dtype: torch.dtype, start: int) -> None:
    x, bias = drawn(70, 64, dtype, 0).cuda(), torch.zeros(64, dtype=dtype, device="cuda")
    buffer = drawn(1, start + 70 * 64, dtype, 1).cuda()[0]
    grad = buffer[start:].view(70, 64)
    for odd in (grad, grad.t().contiguous().t(), buffer[start:].view(64, 70).t()):
        whole = odd.contiguous().clone()
        for mine, right in zip(cuda.gelu_backward(odd, x, bias), cuda.gelu_backward(whole, x, bias), strict=True):
            assert mine.equal(right)
        assert cuda.geglu(odd).equal(cuda.geglu(whole))
        assert cuda.column_sum(odd, dtype).equal(cuda.column_sum(whole, dtype))


@needs_gpu
@low
def test_sums_have_the_same_bits_every_time(dtype: torch.dtype) -> None:
    x, grad, bias = drawn(5001, 768, dtype, 0).cuda(), drawn(5001, 768, dtype, 1).cuda(), torch.ones(768).to(dtype)
    (of_bias, total), *others = (
        (cuda.gelu_backward(grad, x, bias.cuda())[1], cuda.column_sum(grad, torch.float32)) for _ in range(3)
    )
    assert all(of_bias.equal(again) and total.equal(also) for again, also in others)


@needs_gpu
@low
def test_what_the_model_calls_runs_the_kernels_and_never_waits(dtype: torch.dtype) -> None:
    x, gate = drawn(64, 768, dtype, 0).cuda().requires_grad_(), drawn(64, 256, dtype, 1).cuda().requires_grad_()
    weight, bias = drawn(128, 768, dtype, 2).cuda().requires_grad_(), drawn(1, 128, dtype, 3).cuda()[0].requires_grad_()
    assert dispatch.linear(x, weight, bias) is dispatch.geglu(gate) is dispatch.column_sum(x) is cuda
    torch.cuda.set_sync_debug_mode("error")
    try:
        (linear(x, weight, bias) + linear_gelu(x, weight, bias) + geglu(gate)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in (x, gate, weight, bias))


@needs_gpu
def test_the_kernels_run_on_the_current_stream() -> None:
    stream, x = torch.cuda.Stream(), drawn(64, 768, torch.bfloat16, 0).cuda()
    bias = torch.zeros(768, dtype=torch.bfloat16, device="cuda")
    wanted = F.gelu((x + 1).float())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on this stream, so a kernel on another would run before the change below
        x.add_(1)
        out = cuda.gelu(x, bias)
    stream.synchronize()
    torch.testing.assert_close(out.float(), wanted, rtol=2**-8, atol=1e-5)


#: rows and width of a micro-batch's feed-forward network: base, large, ModernBERT; more elements than 32 bits count
MODELS = [(16384, 3072), (16384, 4096), (16384, 1152), (2**20, 5248)]


class Launched:
    """In the place of a launcher: notes what is asked of it."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, int, list[Any]]] = []

    def __call__(self, kernel: str, blocks: int, threads: int, arguments: Any, device: torch.device) -> None:
        assert device.type == "meta"
        self.found.append((kernel, blocks, threads, list(arguments)))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    monkeypatch.undo()  # `guards`, for tensors without data
    return Launched()


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def covers(launch: tuple[str, int, int, list[Any]], name: str, dtype: torch.dtype, rows: int, width: int) -> int:
    """Check that a grid has each row and each pack of columns in one block; the rows that a block takes."""
    kernel, blocks, threads, arguments = launch
    assert kernel == f"{name}<{TYPES[dtype]}, {threads}>"
    *pointers, told_rows, told_width, group = arguments
    assert {type(pointer) for pointer in pointers} == {ctypes.c_size_t}
    assert {type(size) for size in arguments[len(pointers) :]} == {ctypes.c_int}
    assert (told_rows.value, told_width.value) == (rows, width)
    tiles = -(-width * dtype.itemsize // (16 * WARP))
    assert blocks == tiles * -(-rows // group.value) < 2**31
    return int(group.value)


@low
@pytest.mark.parametrize(("rows", "width"), MODELS)
def test_grids_cover_the_matrices_of_real_models(launched: Launched, dtype: torch.dtype, rows: int, width: int) -> None:
    kernels, x, gate = CudaKernels(launched), empty(dtype, rows, width), empty(dtype, rows, 2 * width)
    bias = empty(dtype, width)
    out, (grad_x, grad_bias) = kernels.gelu(x, bias), kernels.gelu_backward(x, x, bias)
    gated, grad_gate, total = kernels.geglu(gate), kernels.geglu_backward(x, gate), kernels.column_sum(x, dtype)
    assert [tuple(made.shape) for made in (out, grad_x, gated)] == [(rows, width)] * 3
    assert {made.dtype for made in (out, grad_x, gated, grad_gate, grad_bias, total)} == {dtype}
    assert (grad_gate.shape, grad_bias.shape, total.shape) == (gate.shape, (width,), (width,))
    ahead, back, sum_back, gate_ahead, gate_back, column, sum_column = launched.found
    for launch, name in ((ahead, "bias_gelu"), (gate_ahead, "geglu"), (gate_back, "geglu_backward")):
        covers(launch, name, dtype, rows, width)
    for launch, then, name in ((back, sum_back, "bias_gelu_backward"), (column, sum_column, "column_sum")):
        assert covers(launch, name, dtype, rows, width) == rows_of_group(rows)
        kernel, blocks, _, (_, parts, columns, _) = then
        assert kernel.startswith(f"sum_partials<{TYPES[dtype]},")
        assert (parts.value, columns.value, blocks) == (-(-rows // rows_of_group(rows)), width, -(-width // WARP))
        assert parts.value <= GROUPS


@pytest.mark.parametrize("width", [4, 12, 3073])
def test_a_width_that_is_not_whole_packs_is_never_launched(launched: Launched, width: int) -> None:
    """`dispatch` asks plain torch for those."""
    kernels, x, bias = CudaKernels(launched), empty(torch.bfloat16, 4, width), empty(torch.bfloat16, width)
    for run in (
        lambda: kernels.gelu(x, bias),
        lambda: kernels.gelu_backward(x, x, bias),
        lambda: kernels.geglu(empty(torch.bfloat16, 4, 2 * width)),
        lambda: kernels.column_sum(x, torch.float32),
    ):
        with pytest.raises(AssertionError):
            run()
    assert launched.found == []


def test_matrices_that_are_too_many_rows_apart_are_copied_first(launched: Launched) -> None:
    """A view of columns has a row stride that the kernels aren't told."""
    kernels, wide = CudaKernels(launched), empty(torch.bfloat16, 70, 64)
    assert kernels.geglu(wide[:, :32]).shape == (70, 16)
    assert kernels.column_sum(wide[:, 32:], torch.float32).shape == (32,)
    with pytest.raises(AssertionError):
        kernels.gelu(wide[:, :32], empty(torch.bfloat16, 32))
