"""Encoder layers dropped: the folder is smaller and loads everywhere, but needs training again."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from engine.config import architecture_of
from engine.config.optimizer import LAYER
from engine.errors import UserError, require
from engine.model.adapters.places import prefix_of


def spread(kept: int, layers: int) -> list[int]:
    """So many of the layers, with the first and the last of them, at even distances (Sanh et al. 2019, DistilBERT).

    >>> spread(3, 6), spread(1, 6), spread(4, 4)
    ([0, 2, 5], [0], [0, 1, 2, 3])
    """
    return [0] if kept == 1 else [index * (layers - 1) // (kept - 1) for index in range(kept)]


def checked(wanted: Sequence[int], layers: int) -> list[int]:
    """Ascending numbers of layers that are kept.

    Raises:
        UserError: a number twice, or of no layer; none.
    """
    shown = ",".join(map(str, wanted))
    fits = bool(wanted) and list(wanted) == sorted(set(wanted)) and wanted[0] >= 0 and wanted[-1] < layers
    require(fits, "layers", shown, f"the model has layers 0 to {layers - 1}; give some of them in ascending order")
    return list(wanted)


@torch.no_grad()
def with_layers(model: nn.Module, head: str, kept: Sequence[int]) -> nn.Module:
    """A model of ours with these layers of another.

    Args:
        model: in evaluation mode; it shares no tensor with what is returned.
        head: as it was built with.
        kept: numbers of its layers, ascending.

    Raises:
        UserError: layers that can't take each other's places.
    """
    config: Any = deepcopy(model.config)
    architecture = architecture_of(config)
    setattr(config, architecture.dimensions["layers"], len(kept))
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    smaller = architecture.build(head, config, False).eval()
    old = dict(model.named_parameters())
    prefix = prefix_of(old, architecture)
    for name, parameter in smaller.named_parameters():
        own = name.removeprefix(prefix)
        found = LAYER.match(own) if name.startswith(prefix) else None
        source = name
        if found is not None:
            source = name[: len(name) - len(own) + found.start(1)] + str(kept[int(found[1])]) + own[found.end(1) :]
        parameter.copy_(old[source])
        parameter.requires_grad_(old[source].requires_grad)
    _check_taken(old, smaller, kept, prefix)
    return smaller


def _check_taken(old: dict[str, nn.Parameter], smaller: nn.Module, kept: Sequence[int], prefix: str) -> None:
    """Refuse to lose a parameter of a kept layer: of one that normalises its input and becomes the first."""
    found = (LAYER.match(name.removeprefix(prefix)) for name in old)
    wanted = sum(1 for each in found if each is not None and int(each[1]) in kept)
    own = sum(1 for name, _ in smaller.named_parameters() if LAYER.match(name.removeprefix(prefix)))
    if own != wanted:
        remedy = f"layer {kept[0]} normalises its input and the first one doesn't; keep layer 0"
        raise UserError(f"layers: {','.join(map(str, kept))} is not allowed; {remedy}")
