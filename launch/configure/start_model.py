"""The dimensions of the model that a run starts from (model.init_from), read without torch and transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import ARCHITECTURES, DEFAULT_ARCHITECTURE, ModelConfig, sizes_of
from engine.errors import UserError
from engine.hub import cached_folder, hub_model


@dataclass(frozen=True)
class FolderShape:
    """What a folder's config.json tells of its model."""

    architecture: str
    dimensions: dict[str, Any]
    """by the names of the fields of `ModelConfig`"""
    vocabulary: int
    options: dict[str, Any]
    """what else it tells, by the same names"""


def folder_config(folder: str) -> FolderShape | None:
    """The dimensions in a folder's config.json; None unless all are readable and positive.

    Of a model of the hub, what the cache holds.
    """
    named = hub_model(folder)
    local = Path(folder) if named is None else cached_folder(named)
    try:
        values = {} if local is None else json.loads((local / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict):
        return None
    kind = values.get("model_type")
    kind = kind if kind in ARCHITECTURES.names else DEFAULT_ARCHITECTURE
    architecture = ARCHITECTURES.get(kind)
    sizes: dict[str, Any] = {name: values.get(theirs) for name, theirs in architecture.dimensions.items()}
    vocabulary: Any = values.get("vocab_size")
    padding: Any = values.get("pad_token_id")
    if not all(isinstance(value, int) for value in (*sizes.values(), vocabulary, padding or 0)):
        return None
    sizes["max_positions"] -= architecture.first_position(padding)
    if min(*sizes.values(), vocabulary) <= 0:
        return None
    return FolderShape(kind, sizes, vocabulary, architecture.options_in(values))


def with_folder(model: ModelConfig, shape: FolderShape) -> ModelConfig:
    """The same model, with the architecture, dimensions and options of the folder in place of `init_from`."""
    known = (*ARCHITECTURES.get(shape.architecture).extensible, *shape.options)
    own = {name: getattr(model, name) for name in known if getattr(model, name) is not None}
    own |= {} if model.kept_layers is None else {"layers": len(model.kept_layers), "init_layers": None}
    return replace(model, init_from=None, architecture=shape.architecture, **(shape.dimensions | shape.options | own))


def check_dimensions(model: ModelConfig, command_line: frozenset[str]) -> None:
    """Refuse dimensions on the command line that differ from those of `init_from`, where they would have no effect.

    Raises:
        UserError: names the dimension, the folder, and the folder's value.
    """
    assert model.init_from is not None
    shape = folder_config(model.init_from)
    if shape is None and hub_model(model.init_from) is None:
        return
    names = ARCHITECTURES.get(DEFAULT_ARCHITECTURE).dimensions if shape is None else shape.dimensions
    fixed = [name for name in names if shape is None or name not in ARCHITECTURES.get(shape.architecture).extensible]
    given = {name: getattr(model, name) for name in fixed if f"model.{name}" in command_line}
    named = sizes_of(model.fresh_architecture if shape is None else shape.architecture)
    if "model.size" in command_line and model.size in named:
        sizes = dict(zip(("hidden_size", "layers", "heads", "intermediate_size"), named[model.size], strict=True))
        given = sizes | given
    for name, value in given.items():
        if shape is not None and value == shape.dimensions[name]:
            continue
        option = f"model.{name}" if f"model.{name}" in command_line else "model.size"
        shown = getattr(model, option.split(".")[1])
        theirs = "its own dimensions" if shape is None else f"{name} {shape.dimensions[name]}"
        raise UserError(
            f"{option}: {shown!r} has no effect: model.init_from {model.init_from!r} has {theirs}; "
            "leave one of the two out"
        )
