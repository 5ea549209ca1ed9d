"""Linear layers with bias and GELU on CPUs, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels import cpu, select
from engine.kernels import linear as kernels

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
needs_products = pytest.mark.skipif(not cpu.multiplies_bf16(), reason="oneDNN has no bf16 products here")
#: bf16 keeps 8 bits: rounding is off by 2^-9 at most, and GELU's argument is rounded before the bias too
ROUNDING = 6e-3


def apart(ours: Tensor | None, exact: Tensor | None) -> float:
    assert ours is not None
    assert exact is not None
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
def test_a_cpu_without_bf16_products_takes_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)
    x, weight, bias = (torch.ones(shape).bfloat16().requires_grad_() for shape in ((4, 8), (3, 8), (3,)))
    result = getattr(kernels, name)(x, weight, bias)
    assert result.grad_fn is not None
    assert "Linear" not in type(result.grad_fn).__name__
    plain = F.linear(x, weight, bias)
    assert torch.equal(result, plain if name == "linear" else F.gelu(plain))


@needs_kernels
@needs_products
@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(7, 8, 3), (40, 64, 17), (301, 96, 160)])
def test_results_and_gradients(name: str, rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    x, weight, bias, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    plain: dict[str, Callable[..., Tensor]] = {"linear": F.linear, "linear_gelu": lambda *all_: F.gelu(F.linear(*all_))}
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    ours = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    result, expected = getattr(kernels, name)(*ours), plain[name](*exact)
    result.backward(grad)
    expected.backward(grad.double())
    assert result.grad_fn is not None
    assert "Linear" in type(result.grad_fn).__name__
    assert apart(result, expected) < ROUNDING
    for mine, right in zip(ours, exact, strict=True):
        assert apart(mine.grad, right.grad) < ROUNDING


@needs_kernels
@pytest.mark.parametrize("width", [1, 16], ids=["numbers", "vectors"])
def test_gelu_of_every_bf16_number(width: int) -> None:
    """No rounding but that of the result and 1.1e-6 of the number; infinities and NaN as in torch."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, width)
    ours, exact = cpu.gelu(x, torch.zeros(width).bfloat16()).double(), F.gelu(x.double())
    finite = x.isfinite() & (x.abs() < 1e30) & (x.abs() > 1e-37)  # halves of the smallest ones round in steps
    allowed = exact.abs() * 2.0**-8 + x.double().abs().clamp(max=5.0) * 1.1e-6
    assert bool(((ours - exact).abs() <= allowed)[finite].all())
    assert bool((ours[x.isnan()]).isnan().all())
    assert float(ours[x == torch.inf]) == torch.inf


@needs_kernels
@pytest.mark.parametrize("width", [1, 16], ids=["numbers", "vectors"])
def test_the_slope_of_gelu_for_every_bf16_number(width: int) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite() & (x.abs() < 1e30)]
    x = x[: len(x) // width * width].view(-1, width)
    exact = x.double().requires_grad_()
    F.gelu(exact).sum().backward()
    ours, of_bias = cpu.gelu_backward(torch.ones_like(x), x, torch.zeros(width).bfloat16())
    assert exact.grad is not None
    assert float((ours.double() - exact.grad).abs().max()) < 2.0**-8 + 1e-5
    assert float(of_bias.sum()) == pytest.approx(float(exact.grad.sum()), rel=1e-5)


@needs_kernels
def test_sums_over_rows_have_the_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(1000, 33, generator=torch.Generator().manual_seed(1)).bfloat16()
    threads = torch.get_num_threads()
    together = cpu.column_sum(x)
    try:
        torch.set_num_threads(1)
        single = cpu.column_sum(x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, single)
    torch.testing.assert_close(together, x.float().sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_takes_what_the_kernels_do_not(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(4, 8).to(dtype), torch.randn(3, 8).to(dtype), torch.randn(3).to(dtype)
    select("reference" if dtype == torch.bfloat16 else "auto")
    try:
        assert torch.equal(kernels.linear(x, weight, bias), F.linear(x, weight, bias))
        assert torch.equal(kernels.linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias)))
    finally:
        select("auto")


@needs_kernels
def test_frozen_factors_get_no_gradient() -> None:
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((4, 8), (3, 8), (3,)))
    bias.requires_grad_()
    kernels.linear(x, weight, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [4.0] * 3
    assert x.grad is None
    assert weight.grad is None
