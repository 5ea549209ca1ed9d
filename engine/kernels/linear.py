"""Linear layers with bias and GELU or GeGLU: what surrounds the matrix products, in as few passes as there can be.

Torch adds a bias by writing it to the output before the product, and sums its gradient slowly in bf16; both show beside
narrow products (17 % of the product for 256 -> 1,024 on the machine where this was measured). In our kernels the bias
goes into the product's last pass or into GELU's, and GELU's gradient and the bias's are one pass.

Shape legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels import dispatch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [T, I]; weight: [O, I]; bias: [O], or None for the product alone.

    Returns:
        [T, O].
    """
    kernels = None if bias is None else dispatch.linear(x, weight, bias)
    if kernels is None:
        return F.linear(x, weight, bias)
    product: Tensor = _Linear.apply(x, weight, bias, kernels)
    return product


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016), the exact one, of `linear(x, weight, bias)`."""
    kernels = dispatch.linear(x, weight, bias)
    if kernels is None:
        return F.gelu(F.linear(x, weight, bias))
    activated: Tensor = _LinearGelu.apply(x, weight, bias, kernels)
    return activated


def geglu(x: Tensor) -> Tensor:
    """GeGLU (Shazeer 2020): GELU, the exact one, of the first half of each row, times the second half.

    Args:
        x: [T, 2 O], as transformers' ModernBertMLP has it between its products.

    Returns:
        [T, O].
    """
    kernels = dispatch.geglu(x)
    if kernels is None:
        activated, gate = x.chunk(2, dim=-1)
        return F.gelu(activated) * gate
    gated: Tensor = _GeGlu.apply(x, kernels)
    return gated


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernels: ModuleType) -> Tensor:
        ctx.save_for_backward(*_kept(ctx, x, weight))
        ctx.kernels = kernels
        product: Tensor = kernels.linear(x, weight, bias)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_bias = ctx.kernels.column_sum(grad, grad.dtype) if ctx.needs_input_grad[2] else None
        return (*_gradients(ctx, grad, x, weight), grad_bias, None)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernels: ModuleType) -> Tensor:
        product = x @ weight.t()
        ctx.save_for_backward(*_kept(ctx, x, weight), bias, product)
        ctx.kernels = kernels
        activated: Tensor = kernels.gelu(product, bias)
        return activated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, product = ctx.saved_tensors
        grad_product, grad_bias = ctx.kernels.gelu_backward(grad.contiguous(), product, bias)
        return (*_gradients(ctx, grad_product, x, weight), grad_bias, None)


class _GeGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: ModuleType) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.kernels = kernels
        gated: Tensor = kernels.geglu(x)
        return gated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return ctx.kernels.geglu_backward(grad.contiguous(), x), None


def _kept(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of the product's factors that a gradient of the other one needs: of a frozen weight no input is kept."""
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    return x if needs_weight else None, weight if needs_x else None


def _gradients(ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the product's factors, as far as they are asked for."""
    return None if weight is None else grad @ weight, None if x is None else grad.t() @ x
