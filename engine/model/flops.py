"""Floating-point operations that an encoder with its heads needs, by arithmetic, without torch.

Matrix products alone count (a multiplication and an addition are two), as Chowdhery et al. 2022 (PaLM), appendix B,
count them; the backward pass costs two forward passes. Padding isn't needed, and neither is recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.config.shape import Shape

#: forward passes that a training step is worth: a backward pass multiplies twice, by the inputs and by the weights
TRAINING_PASSES = 3


def forward_flops(shape: Shape, lengths: Sequence[int], rows: float) -> float:
    """FLOPs of the forward pass over packed sequences: linear layers, attention's two products, pooler, heads.

    The last layer's states are needed of the tokens that the head reads and, for a pooler, of first tokens: only their
    queries, and its products behind attention for them, count. What the former ask there isn't: it depends on where
    they lie (0.1 % of BERT-base's pre-training).

    Args:
        lengths: tokens of each sequence; a token attends to those of its own sequence only.
        rows: states that the head reads over all sequences, beside those of first tokens: MLM's reads masked ones, a
            classifier on the pooled vector none, a classifier of tokens all.
    """
    hidden, tokens = shape.hidden, sum(lengths)
    first = len(lengths) if shape.pooler else 0
    read = min(tokens, first + rows)
    of_all, of_read = 2 * hidden * hidden, 2 * hidden * hidden + shape.feed_forward_elements()
    linear = 2 * tokens * shape.layers * of_all + 2 * (tokens * (shape.layers - 1) + read) * of_read
    pairs = sum(map(shape.attended_pairs, lengths)) + (tokens if shape.pooler else 0)
    attention = 4 * pairs * hidden
    return linear + attention + head_flops(shape, first, rows)


def head_flops(shape: Shape, first: float, rows: float) -> float:
    """FLOPs of the heads alone, and of the layer over first tokens: see `forward_flops`."""
    hidden = shape.hidden
    head = 2 * rows * (hidden * hidden + hidden * shape.vocabulary if shape.decoder else hidden * shape.classes)
    pooled = 2 * first * (hidden * hidden + hidden * shape.classes)
    return head + pooled


def training_flops(shape: Shape, lengths: Sequence[int], rows: float) -> float:
    """FLOPs that forward and backward pass need; what activation checkpointing computes again is not counted."""
    return TRAINING_PASSES * forward_flops(shape, lengths, rows)
