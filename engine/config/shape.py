"""The dimensions of an encoder with its heads, from which parameters, FLOPs, memory and time are computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Transformer encoder with a pooler and a classifier, or MLM's head, or all of them (Devlin et al. 2019)."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    """width between the feed-forward network's matrices"""
    vocabulary: int
    positions: int = 512
    segments: int = 2
    feed_forward_matrices: int = 2
    """of a layer: 2, or 3 where one gates another (Shazeer 2020, "GLU Variants Improve Transformer")"""
    biases: bool = True
    """whether the layers' linear maps have them"""
    norm_biases: bool = True
    """whether LayerNorms, and the linear maps before them in the heads, have biases"""
    head_norm: bool = False
    """whether a classifier reads a normalised vector"""
    pre_norm: bool = False
    """whether each layer normalises its input: the first takes normalised embeddings, and a LayerNorm follows the last
    """
    pools_in_head: bool = False
    """whether the layer over first tokens is part of the head, not of the encoder"""
    learned_positions: bool = True
    """whether positions have embeddings"""
    reach: int = 0
    """tokens to either side that the layers with a window see"""
    windows: int = 0
    """layers with a window, the last one aside"""
    classes: int = 2
    """of the classifier: 2 for NSP"""
    decoder: bool = True
    """whether there is MLM's head, which maps states to the vocabulary by the tied word embeddings"""
    pooler: bool = True
    """whether there are pooler and classifier, which read first tokens"""

    def feed_forward_elements(self) -> int:
        """Elements of a layer's feed-forward matrices."""
        return self.feed_forward_matrices * self.hidden * self.intermediate

    def layer_tensors(self) -> list[int]:
        """Elements of each parameter of a Transformer layer: projections, feed-forward, two LayerNorms."""
        return [size for size, _ in (*self._linear(), *self._norm() * 2)]

    def _linear(self) -> list[tuple[int, bool]]:
        """Elements of each parameter of a layer's linear maps, and whether it is a bias."""
        hidden, intermediate = self.hidden, self.intermediate
        maps = [(hidden, hidden)] * 4 + [(hidden, intermediate)] * (self.feed_forward_matrices - 1)
        maps.append((intermediate, hidden))
        both = [part for inputs, outputs in maps for part in ((inputs * outputs, False), (outputs, True))]
        return both if self.biases else both[::2]

    def _norm(self) -> list[tuple[int, bool]]:
        """As `_linear`, of a LayerNorm."""
        return [(self.hidden, False), (self.hidden, True)][: 2 if self.norm_biases else 1]

    def parts(self) -> Iterator[tuple[str, int | None, int, bool]]:
        """Of each parameter, a tied one once: its part as `engine.model.adapters.places.place` names it, its layer, its
        elements, and whether it is a bias. Embeddings, layers, pooler, MLM's head, classifier."""
        hidden, norm = self.hidden, self._norm()
        positions = self.positions if self.learned_positions else 0
        tables = [(rows * hidden, False) for rows in (self.vocabulary, positions, self.segments) if rows]
        dense = [(hidden * hidden, False), (hidden, True)]
        vector = [*dense[: len(norm)], *norm] if self.head_norm else dense
        decoder = [*dense[: len(norm)], *norm, (self.vocabulary, True)] if self.decoder else []
        classifier = [(self.classes * hidden, False), (self.classes, True)] if self.pooler else []
        layers = [
            (layer, [*self._linear(), *norm * (1 if self.pre_norm and layer == 0 else 2)])
            for layer in range(self.layers)
        ]
        groups: list[tuple[str, int | None, list[tuple[int, bool]]]] = [
            ("embeddings", None, [*tables, *norm]),
            *(("layers", layer, sizes) for layer, sizes in layers),
            ("final_norm", None, norm if self.pre_norm else []),
            ("head" if self.pools_in_head else "pooler", None, vector if self.pooler else []),
            ("head", None, [*decoder, *classifier]),
        ]
        for part, layer, sizes in groups:
            yield from ((part, layer, size, bias) for size, bias in sizes)

    def tensors(self) -> list[int]:
        """Elements of each parameter, a tied one once."""
        return [size for _, _, size, _ in self.parts()]

    def attended_pairs(self, length: int) -> int:
        """Pairs of a query and a key in a sequence, over all layers but the last."""
        return length * length * (self.layers - 1 - self.windows) + self.window_pairs(length) * self.windows

    def window_pairs(self, length: int) -> int:
        """Pairs of a query and a key in a sequence, in a layer with a window."""
        reach = min(self.reach, length - 1)
        return length * (2 * reach + 1) - reach * (reach + 1)

    def layer_parameters(self) -> int:
        """Elements of a Transformer layer."""
        return sum(self.layer_tensors())

    def parameters(self) -> int:
        """Elements of the whole model, each tied one once."""
        return sum(self.tensors())

    def largest_parameter(self) -> int:
        """Elements of the word embeddings."""
        return self.vocabulary * self.hidden
