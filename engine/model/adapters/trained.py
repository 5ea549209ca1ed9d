"""Which parameters of a model are trained, and what adapters add to it, counted from its dimensions, without torch.

What the start model's folder lacks is trained too, and isn't known here: the folder is taken to hold the whole encoder
with the vocabulary of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from engine.config.architecture import Architecture
from engine.config.methods.adapter import AdapterConfig, Frozen, frozen_parts
from engine.config.shape import Shape

if TYPE_CHECKING:
    from engine.config.run import RunConfig

#: matrices of peft's LoRA family, and those that DoRA and AdaLoRA train besides
LOW_RANK = ("lora", "dora", "adalora")


@dataclass(frozen=True)
class Matrix:
    """A linear layer of an encoder layer."""

    names: tuple[str, ...]
    """those of `engine.config.methods.adapter.SINGLE` that it computes"""
    inputs: int
    outputs: int

    @property
    def elements(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Trained:
    """What is trained of a model that starts from a folder."""

    shape: Shape
    adapter: AdapterConfig
    freeze: str | None
    """as train.freeze"""
    architecture: Architecture

    @cached_property
    def frozen(self) -> Frozen:
        """The meaning of train.freeze."""
        return frozen_parts(self.freeze)

    def matrices(self) -> list[Matrix]:
        """The linear layers of an encoder layer, in the order in which they compute."""
        hidden, inner = self.shape.hidden, self.shape.intermediate
        sizes = {
            "query": (hidden, hidden),
            "key": (hidden, hidden),
            "value": (hidden, hidden),
            "attention-output": (hidden, hidden),
            "feed-forward-input": (hidden, (self.shape.feed_forward_matrices - 1) * inner),
            "feed-forward-output": (inner, hidden),
        }
        places: dict[str, list[str]] = {}
        for name in sizes:
            places.setdefault(self.architecture.linear[name], []).append(name)
        return [
            Matrix(tuple(names), sizes[names[0]][0], sum(sizes[name][1] for name in names)) for names in places.values()
        ]

    def adapts(self, matrix: Matrix, layer: int) -> bool:
        """Whether an adapter is put to a linear layer."""
        return not self.frozen.holds("layers", layer) and bool({*self.adapter.layers()} & {*matrix.names})

    def trains(self, part: str, layer: int | None) -> bool:
        """Whether the matrices of a part of the encoder are trained."""
        return self.adapter.method == "none" and not self.frozen.holds(part, layer)

    def trains_biases(self, part: str, layer: int | None) -> bool:
        """Whether its biases are."""
        return self.trains(part, layer) or (self.adapter.method == "bitfit" and not self.frozen.holds(part, layer))

    @property
    def rank(self) -> int:
        """Of each adapter at the start."""
        return self.adapter.initial_rank if self.adapter.method == "adalora" else self.adapter.rank

    def adapter_tensors(self, matrix: Matrix) -> list[int]:
        """Elements of each parameter of an adapter."""
        method = self.adapter.method
        if method in LOW_RANK:
            more = {"lora": [], "dora": [matrix.outputs], "adalora": [self.rank]}[method]
            return [self.rank * matrix.inputs, self.rank * matrix.outputs, *more]
        if method == "ia3":
            return [matrix.inputs if self.scales_input(matrix) else matrix.outputs]
        assert method == "houlsby", method
        width = self.adapter.bottleneck
        return [matrix.outputs * width, width, width * matrix.outputs, matrix.outputs]

    def scales_input(self, matrix: Matrix) -> bool:
        """Whether ia3's vector is on a linear layer's input, not on its output (Liu et al. 2022, section 3.3)."""
        return matrix.names == ("feed-forward-output",)

    def keeps_input(self, matrix: Matrix, layer: int) -> bool:
        """Whether a linear layer's input is needed in the backward pass: for its weight, or for its adapter."""
        adapted, method = self.adapts(matrix, layer), self.adapter.method
        reads = method in LOW_RANK or (method == "ia3" and self.scales_input(matrix))
        return self.trains("layers", layer) or (adapted and reads)

    def added(self) -> list[int]:
        """Elements of each parameter that adapters add to the model."""
        tokens, hidden, layers = self.adapter.virtual_tokens, self.shape.hidden, self.shape.layers
        if self.adapter.method == "prompt":
            return [tokens * hidden]
        if self.adapter.method == "prefix":
            return [tokens * layers * 2 * hidden]
        places = ((matrix, layer) for layer in range(layers) for matrix in self.matrices())
        adapted = [matrix for matrix, layer in places if self.adapts(matrix, layer)]
        return [size for matrix in adapted for size in self.adapter_tensors(matrix)]

    def tensors(self) -> list[int]:
        """Elements of each trained parameter."""
        return [*(size for size, trained in self._base() if trained), *self.added()]

    def parameters(self) -> int:
        """Elements that are trained."""
        return sum(self.tensors())

    def all_parameters(self) -> int:
        """Elements of the model with its adapters."""
        return self.shape.parameters() + sum(self.added())

    def trains_embeddings(self) -> bool:
        """Whether a backward pass reaches the embeddings."""
        biased = self.shape.norm_biases and self.trains_biases("embeddings", None)
        return self.trains("embeddings", None) or biased or self.adapter.method == "prompt"

    def first_layer(self) -> int:
        """The lowest layer that a backward pass reaches; the number of layers where it reaches none."""
        if self.trains_embeddings():
            return 0
        layers = range(self.shape.layers)
        return next((layer for layer in layers if self._reaches(layer)), self.shape.layers)

    def _reaches(self, layer: int) -> bool:
        biased = (self.shape.norm_biases or self.shape.biases) and self.trains_biases("layers", layer)
        adapted = any(self.adapts(matrix, layer) for matrix in self.matrices())
        return self.trains("layers", layer) or biased or adapted or self.adapter.method == "prefix"

    def _base(self) -> Iterator[tuple[int, bool]]:
        """Elements of each parameter of the plain model, and whether it is trained."""
        for part, layer, size, bias in self.shape.parts():
            trained = self.trains_biases(part, layer) if bias else self.trains(part, layer)
            yield size, trained or part == "head"


def trained_of(config: RunConfig, shape: Shape, architecture: Architecture) -> Trained | None:
    """What a run trains of a model of this shape; None where that is all of it."""
    if config.adapter.method == "none" and config.train.freeze is None:
        return None
    return Trained(shape, config.adapter, config.train.freeze, architecture)
