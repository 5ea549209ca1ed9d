"""What a sub-layer costs by the number of its units: FLOPs, bytes, or its share of the units there are.

Shape legend: K sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from engine.compress.prune.search import Numbers
from engine.model.pruning.units import Kind, Sublayer


@dataclass(frozen=True)
class Costs:
    """Of a model: what its units cost, and what is there whatever is kept of them."""

    fixed: float
    heads: Numbers
    """of a layer's attention by the number of heads, from 0 to all"""
    neurons: Numbers
    """of a layer's feed-forward network by the number of neurons, from 0 to all"""

    def of(self, kind: Kind) -> Numbers:
        return self.heads if kind == "heads" else self.neurons

    def whole(self, layers: int) -> float:
        """Of the model as it is."""
        return self.fixed + layers * float(self.heads[-1] + self.neurons[-1])

    def total(self, kept: Sequence[tuple[Kind, int]]) -> float:
        """Of a model that keeps so many units of each sub-layer."""
        return self.fixed + float(sum(self.of(kind)[size] for kind, size in kept))


def flops(parts: Sequence[Sublayer], length: int) -> Costs:
    """FLOPs a token of the encoder's layers in texts of a length; embeddings and heads of tasks multiply little."""
    attention, network = parts[0], parts[1]
    pairs = 4 * length * attention.width
    heads = np.arange(attention.count + 1, dtype=np.float64) * (2.0 * _matrices(attention) * attention.width + pairs)
    neurons = np.arange(network.count + 1, dtype=np.float64) * 2.0 * _matrices(network)
    return Costs(0.0, heads, neurons)


def file_bytes(model: nn.Module, parts: Sequence[Sublayer]) -> Costs:
    """Bytes of the weights, each tied one once, as the units that are kept need them."""
    parameters: list[Any] = list(model.parameters())
    attention, network = parts[0], parts[1]
    size = parameters[0].element_size()
    units = [size * (_matrices(part) * part.width + _biases(part)) for part in (attention, network)]
    whole = float(size * sum(each.numel() for each in parameters))
    layers = len(parts) // 2
    removable = layers * (units[0] * attention.count + units[1] * network.count)
    heads, neurons = (
        np.arange(part.count + 1, dtype=np.float64) * unit for part, unit in zip(parts[:2], units, strict=True)
    )
    return Costs(whole - removable, heads, neurons)


def _biases(part: Sublayer) -> int:
    """Elements of biases that a unit has."""
    biased = (layer for layer in part.inputs.values() if layer.bias is not None)
    return sum(layer.out_features // part.columns * part.width for layer in biased)


def _matrices(part: Sublayer) -> int:
    """Weights of a column of a sub-layer: those that a unit of width 1 has in all of its matrices."""
    rows = sum(layer.out_features // part.columns * layer.in_features for layer in part.inputs.values())
    return rows + part.output.out_features
