"""LoRA (Hu et al. 2022) on a frozen linear layer in as few passes over memory as there can be.

peft makes the adapter's output beside the layer's, scales it and adds it; backward it scales the gradient, and autograd
adds the two gradients of the input: five passes over [T, outputs] or [T, inputs], which show beside narrow products.
Here they are part of products. Modules, parameters and names stay peft's.

Shape legend: T rows, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn

from engine.kernels.linear import linear
from engine.model.adapters.places import ADAPTER

#: kinds of linear layer whose forward pass is no more than a product and a bias
PLAIN = ("Linear", "BertLinear", "ModernBertLinear")


class LoraLinear(lora.Linear):
    """peft's layer; `take_over` makes it of those that are there."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """[T, I] to [T, O]."""
        if args or options or not self._is_simple(x):
            computed: Tensor = super().forward(x, *args, **options)
            return computed
        base = cast("nn.Linear", self.base_layer)
        down, up = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        product: Tensor = _LoraLinear.apply(x, base.weight, base.bias, down, up, self.scaling[ADAPTER])
        return product

    def _is_simple(self, x: Tensor) -> bool:
        """Whether it is one adapter at work on a frozen layer, without dropout. ZeRO-3 fetches weights for a module's
        own forward pass alone, so there it never is."""
        base = cast("nn.Linear", self.base_layer)
        weight, bias, down, up = base.weight, base.bias, self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        alike = x.dim() == 2 and x.dtype == weight.dtype == down.dtype == up.dtype
        whole = not hasattr(weight, "ds_id")
        drops = self.training and isinstance(self.lora_dropout[ADAPTER], nn.Dropout)
        alone = self.active_adapters == [ADAPTER] and not self.disable_adapters and not self.merged
        return frozen and alike and whole and alone and not drops and not torch.is_autocast_enabled(x.device.type)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        inner = (x @ down.t()).mul_(scale)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scale = scale
        return linear(x, weight, bias).addmm_(inner, up.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, down, up, inner = ctx.saved_tensors
        of_inner = (grad @ up).mul_(ctx.scale)
        of_x = (grad @ weight).addmm_(of_inner, down) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_inner.t() @ x, grad.t() @ inner, None


def take_over(model: nn.Module) -> None:
    """Make peft's plain LoRA layers on plain linear ones `LoraLinear`s, in place."""
    for module in model.modules():
        if type(module) is lora.Linear and not module.lora_variant and type(module.base_layer).__name__ in PLAIN:
            module.__class__ = LoraLinear
