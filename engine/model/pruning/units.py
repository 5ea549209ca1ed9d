"""The attention heads and feed-forward neurons of an encoder, by the rows and columns of its matrices.

A unit, a head or a neuron, is some columns of its sub-layer's output matrix and the same number of rows of each of its
input matrices. Without them it adds exactly nothing, and gradient descent leaves it so: no activation of ours makes
anything of zeros. Our modules and those of transformers have the same names, so all of this holds for both.

Shape legend: U units of a sub-layer, D columns of a unit (the width of a head; 1 of a neuron), H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.config import architecture_of
from engine.config.optimizer import LAYER
from engine.model.adapters.places import prefix_of

Kind = Literal["heads", "neurons"]
#: by kind of units, the linear layers before and behind them, as `Architecture.linear` calls them
LINEAR: dict[Kind, tuple[tuple[str, ...], str]] = {
    "heads": (("query", "key", "value"), "attention-output"),
    "neurons": (("feed-forward-input",), "feed-forward-output"),
}


@dataclass(frozen=True)
class Sublayer:
    """Attention or the feed-forward network of one encoder layer."""

    layer: int
    kind: Kind
    width: int
    """D"""
    inputs: dict[str, nn.Linear]
    """by name in the model"""
    output: nn.Linear
    output_name: str

    @property
    def count(self) -> int:
        """U"""
        return self.columns // self.width

    @property
    def columns(self) -> int:
        """U D, also under ZeRO-3, where a matrix may be elsewhere."""
        return self.output.in_features

    def kept(self) -> Tensor:
        """Whether each unit adds anything, [U] bool."""
        found: Tensor = (self.output.weight.detach() != 0).view(-1, self.count, self.width).any(2).any(0)
        return found

    @torch.no_grad()
    def zero(self, removed: Tensor) -> None:
        """Make zeros of units; removed is [U] bool."""
        columns = removed.repeat_interleave(self.width)
        self.output.weight[:, columns] = 0.0
        for layer in self.inputs.values():
            rows = columns.repeat(layer.out_features // self.columns)
            layer.weight[rows] = 0.0
            if layer.bias is not None:
                layer.bias[rows] = 0.0

    @torch.no_grad()
    def shrink(self, kept: Tensor) -> None:
        """Leave these units alone, [U] bool, and make the matrices smaller."""
        columns = kept.repeat_interleave(self.width)
        for layer in self.inputs.values():
            rows = columns.repeat(layer.out_features // self.columns)
            layer.weight = nn.Parameter(layer.weight[rows].clone(), layer.weight.requires_grad)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias[rows].clone(), layer.bias.requires_grad)
            layer.out_features = int(rows.sum())
        self.output.weight = nn.Parameter(self.output.weight[:, columns].clone(), self.output.weight.requires_grad)
        self.output.in_features = int(columns.sum())


def sublayers(model: nn.Module) -> list[Sublayer]:
    """Of each encoder layer attention and the feed-forward network, in the order in which they compute.

    Args:
        model: one of ours or of transformers, with or without a head; its `config` is the transformers configuration.
    """
    config: Any = model.config
    architecture, modules = architecture_of(config), dict(model.named_modules())
    prefix = prefix_of((f"{name}." for name in modules), architecture)
    layers = [name for name in modules if name.startswith(prefix) and _is_layer(name.removeprefix(prefix))]
    found = []
    for number, layer in enumerate(layers):
        for kind, (before, behind) in LINEAR.items():
            names = dict.fromkeys(f"{layer}.{architecture.linear[name]}" for name in before)
            output = f"{layer}.{architecture.linear[behind]}"
            width = config.hidden_size // config.num_attention_heads if kind == "heads" else 1
            found.append(
                Sublayer(number, kind, width, {name: modules[name] for name in names}, modules[output], output)
            )
    return found


def _is_layer(name: str) -> bool:
    """Whether a module of the encoder is a whole layer.

    >>> _is_layer("encoder.layer.3"), _is_layer("encoder.layer.3.output"), _is_layer("encoder.layer")
    (True, False, False)
    """
    return LAYER.fullmatch(f"{name}.") is not None
