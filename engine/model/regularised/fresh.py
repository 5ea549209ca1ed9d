"""The top of an encoder that starts afresh: its last layers and its pooler (Zhang et al. 2021, section 6).

What pre-training made of them serves its own objective, and few examples hardly move them away from it.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from engine.config import RunConfig, architecture_of, require
from engine.config.methods.adapter import frozen_parts
from engine.model.adapters.places import place, prefix_of


def check_fresh(config: RunConfig, layers: int) -> None:
    """Refuse more fresh layers than the encoder's `layers`, and such as would keep their initial values.

    Raises:
        UserError: names regularise.fresh_layers, or what freezes them.
    """
    count, method, freeze = config.regularise.fresh_layers, config.adapter.method, config.train.freeze
    require(count <= layers, "regularise.fresh_layers", count, f"{config.model.init_from} has {layers} layers")
    if count == 0:
        return
    remedy = f"adapter.method {method} adapts pre-trained layers, and these have no such weights; leave it out"
    require(method == "none", "regularise.fresh_layers", count, remedy)
    frozen, first = frozen_parts(freeze), layers - count
    held = any(frozen.holds("layers", layer) for layer in range(first, layers)) or frozen.holds("pooler", None)
    told = f"regularise.fresh_layers {count} lets layers {first} to {layers - 1} and a pooler start untrained"
    require(not held, "train.freeze", freeze, f"{told}; freeze none of them")


def top_of(model: nn.Module, count: int) -> tuple[str, ...]:
    """Beginnings of the names of the parameters of the last `count` layers and, if there is one, the pooler."""
    config: Any = cast(Any, model.config)
    names = [name for name, _ in model.named_parameters()]
    prefix = prefix_of(names, architecture_of(config))
    fresh: set[tuple[str, int | None]] = {
        ("layers", layer) for layer in range(config.num_hidden_layers - count, config.num_hidden_layers)
    }
    fresh |= {("pooler", None)} if count else set()
    return tuple(name for name in names if place(name, prefix) in fresh)
