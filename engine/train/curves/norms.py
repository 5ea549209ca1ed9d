"""Norms of weights and updates, as curves per layer and histograms over parameters; pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from engine.optim.layout import ParameterNorms


def curves(norms: Mapping[str, ParameterNorms], layer_of: Callable[[str], str]) -> dict[str, float]:
    """Curves: L2 norms of each layer's weights and update, their ratio, and the spread of trust ratios.

    A layer's norm is that of the concatenation of its parameters. Trust ratios that are 1 by definition (biases,
    LayerNorm) are left out of the spread; if there is no other, the spread is left out.

    Args:
        norms: of each parameter, by its name.
        layer_of: the layer that a parameter belongs to.
    """
    weights: dict[str, float] = {}
    updates: dict[str, float] = {}
    for name, parameter in norms.items():
        layer = layer_of(name)
        weights[layer] = math.hypot(weights.get(layer, 0.0), parameter.weight)
        updates[layer] = math.hypot(updates.get(layer, 0.0), parameter.update)
    values = {f"weight_norm/{layer}": value for layer, value in weights.items()}
    values |= {f"update_norm/{layer}": value for layer, value in updates.items()}
    values |= {f"update_to_weight/{layer}": updates[layer] / w for layer, w in weights.items() if w > 0}
    ratios = sorted(trust_ratios(norms))
    if ratios:
        values |= {"trust_ratio/lowest": ratios[0], "trust_ratio/median": ratios[len(ratios) // 2]}
        values["trust_ratio/highest"] = ratios[-1]
    return values


def trust_ratios(norms: Mapping[str, ParameterNorms]) -> list[float]:
    """The trust ratios that are not 1 by definition."""
    return [parameter.ratio for parameter in norms.values() if parameter.ratio != 1.0]


def histograms(norms: Mapping[str, ParameterNorms]) -> dict[str, list[float]]:
    """Values over parameters: weight norms, update norms and, with LAMB, trust ratios."""
    found = {
        "parameters/weight_norm": [one.weight for one in norms.values()],
        "parameters/update_norm": [one.update for one in norms.values()],
        "parameters/trust_ratio": trust_ratios(norms),
    }
    return {tag: values for tag, values in found.items() if values}
