"""What a model computes on its way to its predictions: hidden states, queries, keys and values, and MLM's logits.

Shapes: T tokens, R those that a head reads, H width, V vocabulary size, M masked tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from engine.config import Architecture
from engine.config.optimizer import LAYER
from engine.model.bert import MlmDecoder
from engine.model.packing import pick

PROJECTED = ("query", "key", "value")


@dataclass
class Seen:
    """Of one forward pass. Rows behind the tokens belong to none."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    """by layer what it gives, [T or more, H]"""
    projected: dict[str, Tensor] = field(default_factory=dict)
    """queries, keys and values of one layer, [T or more, H] each"""
    logits: Tensor | None = None
    """of masked tokens, [M or more, V]"""


class Watch:
    """Hooks on a model that keep what it computes, while they are asked to.

    They stay on the model, so that activation checkpointing runs the same code twice.
    """

    def __init__(
        self, model: nn.Module, architecture: Architecture, hidden: Sequence[int], relations: int | None, logits: bool
    ) -> None:
        """
        Args:
            hidden: layers whose states are wanted.
            relations: the layer whose queries, keys and values are wanted.
            logits: whether MLM's are.
        """
        self._seen: Seen | None = None
        self._read: Tensor | None = None
        layers = layers_of(model)
        for index in hidden:
            layers[index].register_forward_hook(self._keeper(index))
        if relations is not None:
            self._watch_projections(layers[relations], architecture)
        if hidden or relations is not None:
            last = layers[max(layers)]
            last.register_forward_pre_hook(self._compute_all)
            last.register_forward_hook(self._give_those_read)
        for module in model.modules() if logits else ():
            if isinstance(module, MlmDecoder):
                module.keeps_logits = True
                module.register_forward_hook(self._keep_logits)

    @contextmanager
    def on(self) -> Iterator[Seen]:
        """Inside, the model's pass is kept."""
        self._seen = Seen()
        try:
            yield self._seen
        finally:
            self._seen = None

    def _keeper(self, index: int) -> Any:
        def keep(_: nn.Module, __: Any, made: Tensor | tuple[Tensor, ...]) -> None:
            if self._seen is not None:  # a layer of pre-norm gives what is still to be added to the stream apart
                self._seen.hidden[index] = sum(made[1:], made[0]) if isinstance(made, tuple) else made

        return keep

    def _watch_projections(self, layer: nn.Module, architecture: Architecture) -> None:
        """Of queries, keys and values, which may come from one matrix."""
        places = dict.fromkeys(architecture.linear[name] for name in PROJECTED)
        for place in places:
            names = [name for name in PROJECTED if architecture.linear[name] == place]

            def keep(_: nn.Module, __: Any, made: Tensor, names: Sequence[str] = names) -> None:
                if self._seen is not None:
                    self._seen.projected |= dict(zip(names, made.chunk(len(names), -1), strict=True))

            layer.get_submodule(place).register_forward_hook(keep)

    def _keep_logits(self, _: nn.Module, __: Any, made: dict[str, Tensor]) -> None:
        if self._seen is not None:
            self._seen.logits = made["logits"]

    def _compute_all(self, layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Let the last layer compute all tokens, also those that no head reads; not in evaluations."""
        self._read = given[-1] if layer.training or self._seen is not None else None
        return given if self._read is None else (*given[:-1], None)

    def _give_those_read(self, _: nn.Module, __: Any, made: Tensor | tuple[Tensor, ...]) -> Any:
        read, self._read = self._read, None
        if read is None:
            return None
        return tuple(pick(one, read) for one in made) if isinstance(made, tuple) else pick(made, read)


def layers_of(model: nn.Module) -> dict[int, nn.Module]:
    """A model's encoder layers by their number."""
    return {
        int(numbered[1]): module
        for name, module in model.named_modules()
        if (numbered := LAYER.search(f"{name}.")) and numbered.end() == len(name) + 1
    }
