"""Floating-point operations of a training step where a part of the weights is trained, by arithmetic, without torch.

A frozen matrix has no gradient, below the lowest trained place there is no backward pass at all, and adapters compute
beside the matrices. Counted as in `engine.model.flops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.shape import Shape
from engine.model.adapters.trained import LOW_RANK, Matrix, Trained
from engine.model.flops import forward_flops, head_flops, training_flops


def step_flops(
    shape: Shape, lengths: Sequence[int], rows: float, trained: Trained | None, *, to_words: bool = False
) -> float:
    """FLOPs that forward and backward pass need; see `forward_flops` for the first three arguments.

    Args:
        trained: None where all weights are.
        to_words: whether the gradient by the words' embeddings is needed whatever is trained.
    """
    if trained is None:
        return training_flops(shape, lengths, rows)
    if trained.adapter.method == "prompt":
        lengths = [length + trained.adapter.virtual_tokens for length in lengths]
    counted = (sum(lengths), len(lengths), rows, sum(map(shape.attended_pairs, lengths)))
    walk = _Walk(shape, trained, *counted, reached=to_words)
    return forward_flops(shape, lengths, rows) + walk.layers() + walk.heads()


@dataclass
class _Walk:
    """What is needed beside the plain forward pass, from the embeddings to the heads."""

    shape: Shape
    trained: Trained
    tokens: float
    sequences: float
    rows: float
    pairs: float
    """of all layers but the last"""
    reached: bool = False
    """whether a gradient of the states here is needed: something below is trained"""

    def layers(self) -> float:
        """FLOPs of the encoder's layers."""
        self.reached = self.reached or self.trained.trains_embeddings()
        return sum(self._layer(layer) for layer in range(self.shape.layers))

    def heads(self) -> float:
        """FLOPs of the heads' backward pass."""
        shape, hidden = self.shape, self.shape.hidden
        first = self.sequences if shape.pooler else 0
        product = 2 * first * hidden * hidden
        pools = shape.pools_in_head or self.trained.trains("pooler", None)
        behind = self.reached or (shape.pooler and (pools or self.trained.trains_biases("pooler", None)))
        others = head_flops(shape, first, self.rows) - product
        return product * (pools + self.reached) + others * (1 + behind)

    def _layer(self, layer: int) -> float:
        is_last = layer == self.shape.layers - 1
        first = self.sequences if self.shape.pooler else 0
        read = min(self.tokens, first + self.rows) if is_last else self.tokens
        found, states = 0.0, self.reached
        projected: dict[str, bool] = {}
        for matrix in self.trained.matrices():
            if "query" in matrix.names or "key" in matrix.names or "value" in matrix.names:
                asking = "query" in matrix.names
                rows = self.tokens - asking * (self.tokens - read) / len(matrix.names)
                flops, needed = self._matrix(matrix, layer, rows, self.reached)
                projected |= dict.fromkeys(matrix.names, needed)
            else:
                if matrix.names == ("attention-output",):
                    flops, states = self._attention(projected, is_last)
                    found += flops
                flops, needed = self._matrix(matrix, layer, read, states)
                states = needed or (matrix.names != ("feed-forward-input",) and self.reached)
                self.reached = self.reached or needed
            found += flops
        return found

    def _attention(self, needed: dict[str, bool], is_last: bool) -> tuple[float, bool]:
        """FLOPs of attention's backward pass, and whether a gradient of its output is needed."""
        prefix = self.trained.adapter.method == "prefix"
        pairs = (self.tokens if self.shape.pooler else 0) if is_last else self.pairs / (self.shape.layers - 1)
        asking = (self.sequences if self.shape.pooler else 0) if is_last else self.tokens
        added = asking * self.trained.adapter.virtual_tokens if prefix else 0
        query, key, value = (needed[name] for name in ("query", "key", "value"))
        key, value = key or prefix, value or prefix
        products = value + (query or key) + query + key
        flops = 2 * self.shape.hidden * ((pairs + added) * products + 2 * added)
        return flops, query or key or value

    def _matrix(self, matrix: Matrix, layer: int, rows: float, reached: bool) -> tuple[float, bool]:
        """FLOPs of a linear layer's backward pass and of its adapter, and whether a gradient of its output is needed.

        Args:
            rows: states that it maps.
            reached: whether a gradient of its input is needed.
        """
        trained, product = self.trained, 2 * rows * matrix.elements
        adapted, method = trained.adapts(matrix, layer), trained.adapter.method
        scaled = adapted and method == "ia3" and trained.scales_input(matrix)
        weight = trained.trains("layers", layer)
        bias = self.shape.biases and trained.trains_biases("layers", layer)
        flops = product * (weight + (reached or scaled))
        if adapted and method in LOW_RANK:
            inner, outer = 2 * rows * trained.rank * matrix.inputs, 2 * rows * trained.rank * matrix.outputs
            flops += 2 * (inner + outer) + outer + reached * inner
            flops += 2 * trained.rank * matrix.elements if method == "dora" else 0  # the norm of W + BA
        elif adapted and method == "houlsby":
            inner = 2 * rows * matrix.outputs * trained.adapter.bottleneck
            flops += 2 * 2 * inner + inner + (reached or weight or bias) * inner
        return flops, reached or weight or bias or adapted
