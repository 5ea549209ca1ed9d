"""Bottlenecks behind the projections of sub-layers (Houlsby et al. 2019).

peft has none, and the `adapters` library, which has them, is tied to single versions of transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

#: standard deviation of a bottleneck's matrices at the start (Houlsby et al. 2019, section 3.1: nearly the identity)
DEVIATION = 1e-2


class Bottleneck(nn.Module):
    """A linear layer, and a trained residual on its output: y + up(GELU(down(y)))."""

    def __init__(self, base_layer: nn.Linear, width: int, dropout: float) -> None:
        """
        Args:
            base_layer: frozen, of H outputs.
            width: of the bottleneck.
            dropout: of what is added.
        """
        super().__init__()
        outputs = base_layer.out_features
        self.base_layer = base_layer
        self.down = nn.Linear(outputs, width)
        self.up = nn.Linear(width, outputs)
        self.dropout = nn.Dropout(dropout)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw near-zero matrices (truncated at two deviations) from torch's global generator."""
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION)
            layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] to [T, H]."""
        states: Tensor = self.base_layer(x)
        added: Tensor = self.dropout(self.up(F.gelu(self.down(states))))
        return states + added


def insert(model: nn.Module, names: list[str], width: int, dropout: float) -> None:
    """Put a bottleneck behind each of the linear layers of these names, in place."""
    for name in names:
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        base_layer = getattr(module, own)
        assert isinstance(base_layer, nn.Linear)
        setattr(module, own, Bottleneck(base_layer, width, dropout))
