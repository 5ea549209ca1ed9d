"""Where in an encoder a parameter lies, and which of its linear layers an adapter is put to."""

from __future__ import annotations

from collections.abc import Iterable

from engine.config import AdapterConfig, Architecture, require
from engine.config.methods.adapter import SINGLE, Frozen
from engine.config.optimizer import LAYER

#: what a wrapper calls the layer that it wraps
BASE = ".base_layer."
#: what peft calls the only adapter of a model
ADAPTER = "default"


def plain(name: str) -> str:
    """A parameter's name without the wrappers of adapters around its module."""
    return name.replace(BASE, ".")


def place(name: str, prefix: str) -> tuple[str, int | None]:
    """The part of the encoder that a parameter is of, and its layer's number; ("head", None) outside of the encoder.

    Args:
        prefix: what the names of the encoder's parameters begin with.

    >>> place("bert.encoder.layer.3.output.dense.weight", "bert.")
    ('layers', 3)
    >>> place("bert.embeddings.word_embeddings.weight", "bert.")
    ('embeddings', None)
    >>> place("classifier.weight", "bert.")
    ('head', None)
    """
    if not name.startswith(prefix):
        return "head", None
    own = name.removeprefix(prefix)
    numbered = LAYER.match(own)
    return ("layers", int(numbered[1])) if numbered else (own.split(".")[0], None)


def prefix_of(names: Iterable[str], architecture: Architecture) -> str:
    """What names of the encoder's parameters or modules begin with: nothing in a model that is the encoder alone."""
    return architecture.prefix if any(name.startswith(architecture.prefix) for name in names) else ""


def check_layers(frozen: Frozen, layers: int, rules: str | None) -> None:
    """Refuse numbers of layers that the model doesn't have.

    Raises:
        UserError: names train.freeze and the model's layers.
    """
    for _, last in frozen.layers:
        fits = last is None or last < layers
        require(fits, "train.freeze", rules, f"the model has layers 0 to {layers - 1}")


def targets(adapter: AdapterConfig, architecture: Architecture, frozen: Frozen, modules: Iterable[str]) -> list[str]:
    """The names of the modules that are adapted.

    Args:
        modules: names of all modules of the model.

    Raises:
        UserError: a part of a matrix that the architecture has in one piece.
    """
    wanted = adapter.layers()
    if adapter.targets is not None:
        _check_whole(adapter, architecture, wanted)
    ends, names = {architecture.linear[name] for name in wanted}, list(modules)
    prefix = prefix_of(names, architecture)
    return [name for name in names if _fits(name, prefix, ends, frozen)]


def _fits(name: str, prefix: str, ends: set[str], frozen: Frozen) -> bool:
    part, layer = place(f"{name}.", prefix)
    own = LAYER.match(name.removeprefix(prefix))
    return own is not None and name.removeprefix(prefix)[own.end() :] in ends and not frozen.holds(part, layer)


def _check_whole(adapter: AdapterConfig, architecture: Architecture, wanted: tuple[str, ...]) -> None:
    """Refuse some of the layers that the architecture has in one matrix."""
    for name in wanted:
        together = [other for other in SINGLE if architecture.linear[other] == architecture.linear[name]]
        kind = architecture.config_class().model_type
        remedy = f"a model of type {kind!r} has {', '.join(together)} in one matrix; give attention-input"
        require(set(together) <= set(wanted), "adapter.targets", adapter.targets, remedy)
