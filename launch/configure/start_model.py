"""The dimensions of the model that a run starts from (model.init_from), read without torch and transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import MODEL_SIZES, ModelConfig
from engine.errors import UserError

#: fields of `ModelConfig` -> their names in the config.json of a Hugging Face folder
NAMES = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}


def folder_config(folder: str) -> dict[str, Any] | None:
    """The dimensions in a folder's config.json, by their names there; None unless all are readable and positive."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = [*NAMES.values(), "vocab_size"]
    found = {name: values.get(name) for name in wanted} if isinstance(values, dict) else {}
    whole = all(isinstance(value, int) and value > 0 for value in found.values())
    return found if found and whole else None


def with_folder(model: ModelConfig, found: dict[str, Any]) -> ModelConfig:
    """The same model, with the dimensions of the folder in place of `init_from`."""
    return replace(model, init_from=None, **{name: found[theirs] for name, theirs in NAMES.items()})


def check_dimensions(model: ModelConfig, command_line: frozenset[str]) -> None:
    """Refuse dimensions on the command line that differ from those of `init_from`, where they would have no effect.

    Raises:
        UserError: names the dimension, the folder, and the folder's value.
    """
    assert model.init_from is not None
    found = folder_config(model.init_from)
    if found is None:
        return
    given = {name: getattr(model, name) for name in NAMES if f"model.{name}" in command_line}
    if "model.size" in command_line and model.size in MODEL_SIZES:
        sizes = dict(zip(("hidden_size", "layers", "heads", "intermediate_size"), MODEL_SIZES[model.size], strict=True))
        given = sizes | given
    for name, value in given.items():
        theirs = found[NAMES[name]]
        if value != theirs:
            option = f"model.{name}" if f"model.{name}" in command_line else "model.size"
            shown = getattr(model, option.split(".")[1])
            raise UserError(
                f"{option}: {shown!r} has no effect: model.init_from {model.init_from!r} has {name} {theirs}; "
                "leave one of the two out"
            )
