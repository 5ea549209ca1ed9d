"""Linear layers with their bias and GELU: what surrounds the matrix products, in as few passes as there can be.

Torch adds a bias by writing it to the output before the product, and sums its gradient slowly in bf16; both show beside
narrow products (17 % of the product for 256 -> 1,024 on the machine where this was measured). On CPUs in bf16 the bias
goes into the product's last pass or into GELU's, and GELU's gradient and the bias's are one pass. Elsewhere plain torch
runs.

Shape legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels.cpu.kernels import loaded
from engine.kernels.ops import fused


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [T, I]; weight: [O, I]; bias: [O].

    Returns:
        [T, O].
    """
    if not _takes(x, weight, bias):
        return F.linear(x, weight, bias)
    product: Tensor = _Linear.apply(x, weight, bias)
    return product


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016), the exact one, of `linear(x, weight, bias)`."""
    if not _takes(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias))
    activated: Tensor = _LinearGelu.apply(x, weight, bias)
    return activated


def _takes(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    alike = x.device.type == "cpu" and all(tensor.dtype == torch.bfloat16 for tensor in (x, weight, bias))
    usable = alike and x.ndim == 2 and x.numel() > 0 and _has_bf16_products()
    return usable and fused(x.device)


@cache
def _has_bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this CPU: it needs AVX-512 or newer, and fails without."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # What Inductor calls for a linear layer on CPUs; it adds the bias while the product is still in registers.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_bias = column_sum(grad).to(grad.dtype) if ctx.needs_input_grad[2] else None
        return (*_gradients(ctx, grad, x, weight), grad_bias)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        product = x @ weight.t()
        ctx.save_for_backward(x, weight, bias, product)
        return gelu(product, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, product = ctx.saved_tensors
        grad_product, grad_bias = gelu_backward(grad.contiguous(), product, bias)
        return (*_gradients(ctx, grad_product, x, weight), grad_bias.to(bias.dtype))


def _gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the product's factors, as far as they are asked for."""
    return (
        grad @ weight if ctx.needs_input_grad[0] else None,
        grad.t() @ x if ctx.needs_input_grad[1] else None,
    )


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of `x + bias`, bf16 on CPUs; x: [T, O], bias: [O]."""
    out = torch.empty_like(x)
    _call("gelu_bf16", (x, bias, out), x)
    return out


def gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [T, O] and of bias [O] fp32 in `gelu(x, bias)`."""
    grad_x, grad_bias = torch.empty_like(x), torch.empty(x.shape[1])
    _call("gelu_backward_bf16", (grad, x, bias, grad_x, grad_bias), x)
    return grad_x, grad_bias


def column_sum(x: Tensor) -> Tensor:
    """[T, O] bf16 to [O] fp32, the sum over rows."""
    total = torch.empty(x.shape[1])
    _call("column_sum_bf16", (x, total), x)
    return total


def _call(name: str, tensors: tuple[Tensor, ...], rows: Tensor) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors)
    pointers = (tensor.data_ptr() for tensor in tensors)
    getattr(loaded(), name)(*pointers, *rows.shape, torch.get_num_threads())
