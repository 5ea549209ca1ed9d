"""The CUDA kernels of layer normalisation on a GPU: against float64, in masks with the CPU's, and through autograd.

Skipped where there is no GPU; the emulator's tests run the same cases on the same sources everywhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import cuda, dispatch
from engine.kernels.layers import added_norm, normalised_sum
from engine.kernels.terms import NO_DROPOUT
from tests.cuda_emulator.float64 import error
from tests.kernels.test_emulator_layers import BF16, FP16, FP32, INNER, OUTER, TOLERANCE, WIDTHS, Case

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: the CUDA kernels are only compiled and emulated here"
)
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)


class OnGpu:
    """The kernels for tensors of the CPU, whose copies on the GPU start where they are told."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def placed(self, value: Any) -> Any:
        """A tensor's copy on the GPU; a vector's starts `offset` elements behind 16 bytes."""
        if not isinstance(value, Tensor):
            return value
        if value.ndim > 1 or not self.offset:
            return value.contiguous().cuda()
        buffer = torch.empty(len(value) + self.offset, dtype=value.dtype, device="cuda")
        return buffer[self.offset :].copy_(value)

    def layer_norm(self, *arguments: Any) -> tuple[Tensor, ...]:
        """See `cuda.layer_norm`."""
        return tuple(made.cpu() for made in cuda.layer_norm(*map(self.placed, arguments)))

    def layer_norm_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """See `cuda.layer_norm_backward`."""
        return tuple(made.cpu() for made in cuda.layer_norm_backward(*map(self.placed, arguments)))


@pytest.mark.parametrize(("dtype", "width"), WIDTHS, ids=str)
@pytest.mark.parametrize("rows", [1, 1003, 5000])
def test_results_and_gradients_agree_with_float64(dtype: torch.dtype, width: int, rows: int) -> None:
    Case(rows, width, dtype, INNER, OUTER).check(OnGpu(0))


@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {"residual": False, "outer": OUTER},
        {"bias": False},
        {"offset": 1},
        {"elsewhere": True, "inner": INNER},
        {"elsewhere": True, "residual": False, "bias": False},
    ],
    ids=lambda options: " ".join(options),
)
def test_each_use(dtype: torch.dtype, options: dict[str, Any]) -> None:
    Case(77, 768, dtype, **options).check(OnGpu(options.get("offset", 0)))


@dtypes
def test_results_have_the_same_bits_every_time(dtype: torch.dtype) -> None:
    case = Case(3001, 768, dtype, INNER, OUTER)
    first, again = (case.run(OnGpu(0)) for _ in range(2))
    assert all(mine.equal(right) for mine, right in zip(first, again, strict=True))


@dtypes
def test_what_the_model_calls_runs_the_kernels_and_never_waits(dtype: torch.dtype) -> None:
    x, residual = (torch.randn(64, 768, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))
    weight = torch.ones(768, device="cuda", dtype=dtype).requires_grad_()
    assert dispatch.normalised_sum(x, residual, weight) is cuda
    torch.cuda.set_sync_debug_mode("error")
    try:
        normalised_sum(x, residual, weight, None, 1e-12, dropout=0.1).sum().backward()
        summed, normalised = added_norm(x, residual, weight, None, 1e-5)
        (summed + normalised).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_kernels_run_on_the_current_stream() -> None:
    stream, x, weight = torch.cuda.Stream(), torch.randn(64, 768, device="cuda"), torch.ones(768, device="cuda")
    wanted = torch.nn.functional.layer_norm(x + 1e3 * weight.cumsum(0), (768,), weight, None, 1e-5)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on this stream, so a kernel on another would run before the change below
        x.add_(1e3 * weight.cumsum(0))
        out, *_ = cuda.layer_norm(x, None, weight, None, 1e-5, NO_DROPOUT, NO_DROPOUT)
    stream.synchronize()
    assert error(out, wanted.double()) <= TOLERANCE[FP32] * 10
