"""Linear layers with bias and GELU, and GeGLU, on CPUs and by the emulated CUDA kernels, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import ModernBertConfig
from transformers.models.modernbert.modeling_modernbert import ModernBertMLP

from engine.kernels import cpu, select
from engine.kernels import linear as kernels
from tests.cuda_emulator.emulated import emulated_kernels

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
needs_products = pytest.mark.skipif(not cpu.multiplies_bf16(), reason="oneDNN has no bf16 products here")
#: bf16 keeps 8 bits: rounding is off by 2^-9 at most, and GELU's argument is rounded before the bias too
ROUNDING = 6e-3
BF16, F64 = torch.bfloat16, torch.float64


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
    torch.testing.assert_close(of_bias.double(), exact.grad.sum(0), rtol=2.0**-8 + 1e-5, atol=0.0)


@needs_kernels
def test_sums_over_rows_have_the_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(1000, 33, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(cpu.column_sum(x, torch.float32))
    finally:
        torch.set_num_threads(before)
    together, *others = sums
    assert all(torch.equal(together, other) for other in others)
    torch.testing.assert_close(together, x.float().sum(0))
    assert cpu.column_sum(x, torch.bfloat16).equal(together.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_takes_what_the_kernels_do_not(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(4, 8).to(dtype), torch.randn(3, 8).to(dtype), torch.randn(3).to(dtype)
    select("reference" if dtype == torch.bfloat16 else "auto")
    try:
        assert torch.equal(kernels.linear(x, weight, bias), F.linear(x, weight, bias))
        assert torch.equal(kernels.linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias)))
        assert torch.equal(kernels.geglu(x.half()), F.gelu(x.half()[:, :4]) * x.half()[:, 4:])
    finally:
        select("auto")


@pytest.fixture(params=["cpu", "emulated"])
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The back end of bf16 on this CPU, the CUDA kernels by their emulator among them."""
    if request.param == "cpu" and not cpu.available():
        pytest.skip("no C++ compiler")
    chosen = cpu if request.param == "cpu" else emulated_kernels()
    for name in ("linear", "geglu"):
        monkeypatch.setattr(kernels.dispatch, name, lambda *_: chosen)
    return chosen


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
@pytest.mark.parametrize("trained", [(0,), (2,), (0, 2), (1,), (0, 1, 2)])
def test_a_frozen_weight_keeps_no_input_and_the_other_gradients_stay(
    name: str, trained: tuple[int, ...], back_end: Any
) -> None:
    if back_end is cpu and not cpu.multiplies_bf16():
        pytest.skip("oneDNN has no bf16 products here")
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in ((40, 64), (16, 64), (16,))]
    grad = torch.randn(40, 16, generator=generator).bfloat16()
    every = [tensor.clone().requires_grad_() for tensor in given]
    getattr(kernels, name)(*every).backward(grad)
    some = [tensor.clone().requires_grad_(index in trained) for index, tensor in enumerate(given)]
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(id(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = getattr(kernels, name)(*some)
    x, weight, _ = some
    assert (id(x) in kept) == (1 in trained)
    assert (id(weight) in kept) == (0 in trained)
    result.backward(grad)
    for index, (mine, right) in enumerate(zip(some, every, strict=True)):
        assert (mine.grad is None) == (index not in trained)
        assert index not in trained or torch.equal(mine.grad, right.grad)


@pytest.mark.parametrize("rows", [1, 77])
@pytest.mark.parametrize("width", [24, 48], ids=["numbers", "vectors"])
def test_geglu_is_what_modernbert_does_between_its_products(back_end: Any, rows: int, width: int) -> None:
    mlp = ModernBertMLP(ModernBertConfig(hidden_size=8, intermediate_size=width))
    mlp.Wi, mlp.Wo = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(rows)
    x, grad = (torch.randn(rows, size, generator=generator).bfloat16() for size in (2 * width, width))
    exact = x.double().requires_grad_()
    expected = mlp(exact)
    expected.backward(grad.double())
    result = kernels.geglu(x.requires_grad_())
    result.backward(grad)
    assert type(result.grad_fn).__name__ == "_GeGluBackward"
    assert apart(result, expected) < ROUNDING
    assert apart(x.grad, exact.grad) < ROUNDING


@needs_kernels
def test_geglu_in_fp32_is_as_exact_as_fp32() -> None:
    """Of arguments from far below GELU's foot to far above, and of infinities and NaN."""
    x = torch.linspace(-12, 12, 4800).view(50, 96).requires_grad_()
    exact = x.detach().double().requires_grad_()
    result, expected = kernels.geglu(x), F.gelu(exact[:, :48]) * exact[:, 48:]
    result.sum().backward()
    expected.sum().backward()
    assert type(result.grad_fn).__name__ == "_GeGluBackward"
    assert apart(result, expected) < 2e-7
    assert apart(x.grad, exact.grad) < 3e-7
    odd = torch.tensor([[torch.inf, -100.0, torch.nan, 1.0, 1.0, 1.0]])
    assert kernels.geglu(odd).nan_to_num(7.0, posinf=9.0).tolist() == [[9.0, 0.0, 7.0]]


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
def test_a_layer_of_any_back_end_agrees_with_float64(back_end: Any, name: str) -> None:
    if back_end is cpu and not cpu.multiplies_bf16():
        pytest.skip("oneDNN has no bf16 products here")
    generator = torch.Generator().manual_seed(3)
    shapes = ((130, 24), (40, 24), (40,), (130, 40))
    x, weight, bias, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    exact, ours = ([tensor.to(kind).requires_grad_() for tensor in (x, weight, bias)] for kind in (F64, BF16))
    expected = F.linear(*exact)
    (expected if name == "linear" else F.gelu(expected)).backward(grad.double())
    getattr(kernels, name)(*ours).backward(grad)
    for mine, right in zip(ours, exact, strict=True):
        assert apart(mine.grad, right.grad) < ROUNDING


def test_a_layer_without_bias_is_the_product_alone() -> None:
    x, weight = torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(16, 8).bfloat16().requires_grad_()
    result = kernels.linear(x, weight, None)
    result.sum().backward()
    assert result.equal(F.linear(x, weight))
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape


@needs_kernels
def test_frozen_factors_get_no_gradient() -> None:
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((4, 8), (3, 8), (3,)))
    bias.requires_grad_()
    kernels.linear(x, weight, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [4.0] * 3
    assert x.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
def test_a_frozen_weight_keeps_no_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.dispatch, "linear", lambda *_: emulated_kernels())
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((40, 8), (24, 8), (24,)))

    def passed(*trained: Tensor) -> tuple[bool, Tensor]:
        for tensor in (x, weight, bias):
            tensor.requires_grad_(any(tensor is one for one in trained)).grad = None
        kept: list[Tensor] = []

        def keep(saved: Tensor) -> Tensor:
            kept.append(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            result = getattr(kernels, name)(x, weight, bias)
        result.backward(torch.ones_like(result))
        assert x.grad is not None
        return any(saved.data_ptr() == x.data_ptr() for saved in kept), x.grad

    frozen, all_trained = passed(x), passed(x, weight, bias)
    assert (frozen[0], all_trained[0]) == (False, True)
    assert torch.equal(frozen[1], all_trained[1])
