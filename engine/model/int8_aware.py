"""Linear layers that compute in fine-tuning with the numbers that int8 will leave them (Jacob et al. 2018).

Weights and inputs are rounded to what bytes can tell, and gradients pass the rounding as if it weren't there
(straight-through, Bengio et al. 2013). Nothing is kept but the weights: scales are those of the weights and inputs at
hand. Weights have a scale for each output and 7 bits, which every processor adds up exactly; inputs have one for each
token, so that what a sequence gives doesn't depend on its neighbours, on ranks or on accumulation. An int8 model has
one for a tensor, which is coarser.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import require
from engine.config.optimizer import LAYER
from engine.kernels.linear import linear

#: steps on each side of zero of a weight, and steps of an input
WEIGHT_STEPS, INPUT_STEPS = 64, 255


class Int8AwareLinear(nn.Linear):
    """A linear layer on packed tokens with rounded weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        return linear(rounded_inputs(x), rounded_weights(self.weight), self.bias)


def rounded_weights(weight: Tensor) -> Tensor:
    """[O, I], each row a whole number of 64ths of its largest value; the gradient is that of `weight`."""
    with torch.no_grad():
        exact = weight.float()
        scale = (exact.abs().amax(1, keepdim=True) / WEIGHT_STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        moved = (torch.round(exact / scale) * scale).to(weight.dtype) - weight
    return weight + moved


def rounded_inputs(x: Tensor) -> Tensor:
    """[T, I], each row in 255 equal steps from its least to its largest value, of which one is 0; the gradient is that
    of `x`."""
    with torch.no_grad():
        exact = x.float()
        low, high = exact.amin(1, keepdim=True).clamp(max=0.0), exact.amax(1, keepdim=True).clamp(min=0.0)
        scale = ((high - low) / INPUT_STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.round(-low / scale)
        steps = (torch.round(exact / scale) + zero).clamp(0, INPUT_STEPS)
        moved = ((steps - zero) * scale).to(x.dtype) - x
    return x + moved


def round_layers(model: nn.Module) -> None:
    """Let the linear layers of a model's encoder layers compute with rounded numbers; in place, parameters stay.

    Raises:
        UserError: the architecture calls its layers otherwise.
    """
    found = [(name, each) for name, each in model.named_modules() if LAYER.search(name) and isinstance(each, nn.Linear)]
    require(bool(found), "train.int8_aware", True, "the model has no layers that can be int8; leave it out")
    for name, layer in found:
        parent, _, own = name.rpartition(".")
        aware = Int8AwareLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        aware.weight, aware.bias = layer.weight, layer.bias
        setattr(model.get_submodule(parent), own, aware)
