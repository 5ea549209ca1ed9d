"""The dimensions of an encoder with its heads, from which parameters, FLOPs, memory and time are computed."""

from __future__ import annotations

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
        hidden, intermediate = self.hidden, self.intermediate
        maps = [(hidden, hidden)] * 4 + [(hidden, intermediate)] * (self.feed_forward_matrices - 1)
        maps.append((intermediate, hidden))
        linear = [size for inputs, outputs in maps for size in (inputs * outputs, outputs)]
        return [*(linear if self.biases else linear[::2]), *self._norm() * 2]

    def _norm(self) -> list[int]:
        """Elements of each parameter of a LayerNorm."""
        return [self.hidden] * (2 if self.norm_biases else 1)

    def tensors(self) -> list[int]:
        """Elements of each parameter, a tied one once: embeddings, layers, pooler, MLM's head, classifier."""
        hidden = self.hidden
        positions = self.positions if self.learned_positions else 0
        tables = [rows * hidden for rows in (self.vocabulary, positions, self.segments) if rows]
        dense, norm = [hidden * hidden, hidden], self._norm()
        head = [*dense[: len(norm)], *norm, self.vocabulary] if self.decoder else []
        vector = [*dense[: len(norm)], *norm] if self.head_norm else dense
        pooled = [*vector, self.classes * hidden, self.classes] if self.pooler else []
        return [*tables, *norm, *self.layer_tensors() * self.layers, *pooled[:-2], *head, *pooled[-2:]]

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
