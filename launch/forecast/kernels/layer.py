"""The kernels of a Transformer layer."""

from __future__ import annotations

from launch.forecast.kernels.counting import (
    FULL,
    OURS,
    Kernel,
    Step,
    Variant,
    activation_backward,
    linear_backward,
    norm,
    norm_backward,
    product,
    sweep,
)


def layer_forward(step: Step, rows: float, variant: Variant = OURS, *, window: bool = False) -> list[Kernel]:
    """A layer's forward pass, with a window or without; what is behind keys and values sees `rows` of the tokens."""
    return [*_attention(step, variant, rows, window), *_feed_forward(step, variant, rows)]


def layer_backward(step: Step, rows: float, variant: Variant = OURS, *, window: bool = False) -> list[Kernel]:
    """As `layer_forward`."""
    return [*_feed_forward_backward(step, variant, rows), *_attention_backward(step, variant, rows, window)]


def _projections(step: Step, variant: Variant, rows: float) -> list[Kernel]:
    """Queries of `rows`, keys and values of all tokens."""
    tokens, hidden, part = step.tokens(variant), step.work.shape.hidden, "QKV projections"
    if variant.joint and rows == tokens:
        return [product(step, part, tokens, hidden, 3 * hidden)]
    return [product(step, part, count, hidden, hidden) for count in (rows, tokens, tokens)]


def _projections_backward(step: Step, variant: Variant, rows: float) -> list[Kernel]:
    """As `_projections`; three gradients of one input are summed, those of picked rows after they went into zeros."""
    tokens, hidden, part = step.tokens(variant), step.work.shape.hidden, "QKV projections"
    bias = step.work.shape.biases
    if variant.joint and rows == tokens:
        return linear_backward(step, variant, part, tokens, hidden, 3 * hidden, bias=bias)
    found = [
        kernel
        for count in (rows, tokens, tokens)
        for kernel in linear_backward(step, variant, part, count, hidden, hidden, bias=bias)
    ]
    sums = 2 if rows == tokens else 1
    return [*found, sweep(step, part, tokens * hidden, 3 * sums, launches=sums)]


def _attention(step: Step, variant: Variant, rows: float, window: bool) -> list[Kernel]:
    """Projections, turns, attention, output projection, residual sum; of the last layer those that ask are picked."""
    tokens, hidden, work = step.tokens(variant), step.work.shape.hidden, step.work
    picked = [sweep(step, "attention", rows * hidden, 2)] if rows < tokens else []
    return [
        *picked,
        *_projections(step, variant, rows),
        *_turns(step, variant),
        *(_plain_scores(step, variant) if work.attention == "plain" else [_flash(step, variant, rows, window)]),
        product(step, "output projection", rows, hidden, hidden),
        *norm(step, variant, "residual + LayerNorm", rows * hidden),
    ]


def _attention_backward(step: Step, variant: Variant, rows: float, window: bool) -> list[Kernel]:
    """As `_attention`, from the end; the gradients of picked rows are summed and go into zeros."""
    tokens, hidden, work = step.tokens(variant), step.work.shape.hidden, step.work
    state, part = tokens * hidden, "residual + LayerNorm"
    spread = [sweep(step, "attention", rows * hidden, 3 + 3, launches=2), sweep(step, "attention", state, 1)]
    plain = work.attention == "plain"
    return [
        *norm_backward(step, variant, part, rows * hidden),
        *linear_backward(step, variant, "output projection", rows, hidden, hidden, bias=work.shape.biases),
        *(_plain_scores_backward(step, variant) if plain else [_flash_backward(step, variant, rows, window)]),
        *_turns(step, variant),
        *_projections_backward(step, variant, rows),
        *(spread if rows < tokens else []),
        sweep(step, part, state, 3),
    ]


def _turns(step: Step, variant: Variant) -> list[Kernel]:
    """Rotary positions of queries and keys by plain torch, forward or backward: to fp32, four products and two sums of
    halves, their halves together, and back."""
    elements, low = step.tokens(variant) * step.work.shape.hidden, step.work.width
    moved = (low + FULL) + 4 * FULL + 3 * FULL + 2 * FULL + (FULL + low)
    return [] if step.work.shape.learned_positions else [Kernel("attention", 0.0, 2 * moved * elements, 2 * 9)]


def _flash(step: Step, variant: Variant, rows: float, window: bool) -> Kernel:
    """Queries and context of `rows`, keys and values of all tokens, a statistic in fp32 for each query and head."""
    tokens, shape = step.tokens(variant), step.work.shape
    moved = step.work.width * 2 * (rows + tokens) * shape.hidden + FULL * rows * shape.heads
    return Kernel("attention", 4.0 * rows * step.met(variant, window) * shape.hidden, moved)


def _flash_backward(step: Step, variant: Variant, rows: float, window: bool) -> Kernel:
    """Five products where the forward pass has two, in three launches: products of context and gradient, which also
    sets the fp32 sums of the queries' gradients to zero; the products; the sums in the queries' precision."""
    tokens, shape, low = step.tokens(variant), step.work.shape, step.work.width
    of_queries = low * (2 + 2 + 1) + FULL * (1 + 2 + 1)
    moved = (of_queries * rows + low * 4 * tokens) * shape.hidden + 3 * FULL * rows * shape.heads
    return Kernel("attention", 10.0 * rows * step.met(variant, window) * shape.hidden, moved, 3)


def _plain_scores(step: Step, variant: Variant) -> list[Kernel]:
    """Scores, softmax, dropout, context; scale and mask in the softmax's pass or in their own."""
    return _score_passes(step, variant, products=2, sweeps=1 if variant.fused else 3, tensors=2)


def _plain_scores_backward(step: Step, variant: Variant) -> list[Kernel]:
    """As `_plain_scores`: the softmax's gradient, unfused the scale's too."""
    return _score_passes(step, variant, products=4, sweeps=1 if variant.fused else 2, tensors=3)


def _score_passes(step: Step, variant: Variant, products: int, sweeps: int, tensors: int) -> list[Kernel]:
    """Products that each read or write all scores, dropout, copies that set four tensors' heads apart.

    Args:
        sweeps: passes over the scores; tensors: of scores, that each of them reads or writes.
    """
    part, width, tokens = "attention", variant.score_bytes, step.tokens(variant)
    pairs, state = tokens * step.seen(variant), tokens * step.work.shape.hidden
    scores = pairs * step.work.shape.heads
    multiplied = Kernel(part, 2.0 * pairs * step.work.shape.hidden, step.work.width * 2 * state + width * scores)
    dropout = [Kernel(part, 0.0, (2 * width + 1) * scores)] if step.work.dropout > 0 else []
    passes = [Kernel(part, 0.0, tensors * width * scores)] * sweeps
    return [*[multiplied] * products, *passes, *dropout, sweep(step, part, state, 2 * 4, launches=4)]


def _feed_forward(step: Step, variant: Variant, rows: float) -> list[Kernel]:
    shape = step.work.shape
    branches = shape.feed_forward_matrices - 1
    return [
        *[product(step, "FFN", rows, shape.hidden, shape.intermediate)] * branches,
        sweep(step, "GELU", rows * shape.intermediate, 1 + branches),
        product(step, "FFN", rows, shape.intermediate, shape.hidden),
        *norm(step, variant, "residual + LayerNorm", rows * shape.hidden),
    ]


def _feed_forward_backward(step: Step, variant: Variant, rows: float) -> list[Kernel]:
    shape = step.work.shape
    hidden, inner, branches = shape.hidden, shape.intermediate, shape.feed_forward_matrices - 1
    return [
        *norm_backward(step, variant, "residual + LayerNorm", rows * hidden),
        *linear_backward(step, variant, "FFN", rows, inner, hidden, bias=shape.biases),
        *activation_backward(step, variant, "FFN", rows, hidden, inner, branches=branches, bias=shape.biases),
        sweep(step, "residual + LayerNorm", rows * hidden, 3 * branches, launches=branches),
    ]
