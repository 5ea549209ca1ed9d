"""Make a folder's matrices smaller where all of its layers can be: what a Hugging Face configuration can say."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config import architecture_of
from engine.model.pruning.units import sublayers


def compact(model: nn.Module) -> int:
    """Take out, in place, feed-forward neurons that are zeros, as many in each layer; how many a layer keeps.

    A configuration has one number for all layers, so those with fewer keep zeros. Heads stay, whose number is also
    that of a head's width.
    """
    config: Any = model.config
    networks = [part for part in sublayers(model) if part.kind == "neurons"]
    kept = [part.kept() for part in networks]
    most = max(1, *(int(each.sum()) for each in kept))
    for part, own in zip(networks, kept, strict=True):
        padding = (~own).nonzero()[: most - int(own.sum()), 0]
        own[padding] = True
        if most < part.count:
            part.shrink(own)
    setattr(config, architecture_of(config).dimensions["intermediate_size"], most)
    return most


def zeros(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By kind of units, how many of them a model has, and how many of these are zeros."""
    found: dict[str, tuple[int, int]] = {}
    with torch.no_grad():
        for part in sublayers(model):
            units, empty = found.get(part.kind, (0, 0))
            found[part.kind] = (units + part.count, empty + part.count - int(part.kept().sum()))
    return found
