"""Sizes of a ladder: shapes of constant proportions, and their parameters counted three ways. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from engine.config import ARCHITECTURES, ModelConfig, Shape
from engine.errors import UserError, require

#: layers that a shape may have
MOST_LAYERS = 128


@dataclass(frozen=True)
class Proportions:
    """What all sizes of a ladder have in common."""

    width_per_layer: float = 64.0
    """BERT-base's; its deeper kin have less (BERT-large 43)"""
    head_width: int = 64
    """the width is a multiple of it; one attention head has so much"""


@dataclass(frozen=True)
class Size:
    """A size of a ladder; its feed-forward width is as wide as in the architecture's named sizes."""

    architecture: str
    hidden: int
    layers: int
    heads: int

    @property
    def name(self) -> str:
        return f"h{self.hidden}-l{self.layers}"

    @cached_property
    def model(self) -> ModelConfig:
        """The options of the section model."""
        return ModelConfig(
            architecture=self.architecture, hidden_size=self.hidden, layers=self.layers, heads=self.heads
        )

    def shape(self, vocabulary: int, *, pairs: bool) -> Shape:
        """The shape with MLM's head, and with NSP's for pairs."""
        return replace(ARCHITECTURES.get(self.architecture).shape(self.model, vocabulary), pooler=pairs)


@dataclass(frozen=True)
class Counts:
    """Parameters of a shape, counted in the ways that laws are told by; a ladder's exponent depends on the choice."""

    all: int
    no_embedding: int
    """layers, their last LayerNorm, the dense layers of the heads: what laws use here (Kaplan et al. 2020)"""
    with_decoder: int
    """those, and the matrix and biases that map states to the vocabulary, though the embeddings share the matrix"""


def counts(shape: Shape) -> Counts:
    """The parameters of a shape."""
    total = shape.parameters()
    embeddings = sum(size for part, _, size, _ in shape.parts() if part == "embeddings")
    biases = shape.vocabulary if shape.decoder else 0
    rest = total - embeddings - biases
    return Counts(total, rest, rest + (shape.largest_parameter() + biases if shape.decoder else 0))


def size_near(target: float, architecture: str, proportions: Proportions) -> Size:
    """The shape whose layers have about `target` parameters, with width and depth in proportion.

    Of all depths the one is taken that is least off in parameters and in proportion, both as logarithms.

    Raises:
        UserError: the target is smaller than the smallest shape, or too large.
    """
    require(math.isfinite(target) and target > 0, "sizes", target, "give a number of parameters such as 1e6")
    found = min(
        ((_off(size, target, proportions), size) for size in _shapes(target, architecture, proportions)),
        key=lambda each: each[0],
    )[1]
    parameters = layer_parameters(found)
    if not 0.5 < parameters / target < 2.0:
        raise UserError(
            f"sizes: no shape with heads of width {proportions.head_width} has about {target:g} parameters (nearest "
            f"{parameters:,}); give another size, or a smaller proportions.head_width"
        )
    return found


def layer_parameters(size: Size) -> int:
    """Parameters of all Transformer layers."""
    return size.layers * size.shape(1, pairs=False).layer_parameters()


def _shapes(target: float, architecture: str, proportions: Proportions) -> list[Size]:
    step = proportions.head_width
    wide = Size(architecture, 64 * step, 1, 64)
    per_square = layer_parameters(wide) / wide.hidden**2  # 12 of BERT
    sizes = []
    for layers in range(1, MOST_LAYERS + 1):
        exact = math.sqrt(target / (per_square * layers)) / step
        for multiple in {max(1, math.floor(exact)), max(1, math.ceil(exact))}:
            sizes.append(Size(architecture, multiple * step, layers, multiple))
    return sizes


def _off(size: Size, target: float, proportions: Proportions) -> float:
    shape = math.log(size.hidden / size.layers / proportions.width_per_layer)
    return abs(math.log(layer_parameters(size) / target)) + abs(shape) / 4


def geometric(low: float, high: float, count: int) -> list[float]:
    """Numbers from low to high with equal ratios.

    >>> [round(value) for value in geometric(1, 100, 3)]
    [1, 10, 100]
    """
    if count == 1:
        return [high]
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]
