"""The kernels of an optimizer step: those of its layers, of what is before and behind them, and of the update."""

from __future__ import annotations

from itertools import chain

from engine.config import OPTIMIZERS
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
from launch.forecast.kernels.layer import layer_backward, layer_forward

#: elements that one launch of torch's multi-tensor kernels takes: 320 chunks of 65536 (ATen ForeachUtils, apex)
MULTI_TENSOR = 320 * 65536
#: bytes a logit between the decoder's products, forward and backward: ours reads and writes it once; torch casts it to
#: fp32, and has passes of log_softmax and nll_loss (benchmarks.fused_loss --counts)
LOGIT_BYTES, PLAIN_LOGIT_BYTES = 4, 48


def forward(step: Step, variant: Variant = OURS) -> list[Kernel]:
    """The forward pass of a micro-batch."""
    layers = [layer_forward(step, rows, variant, window=window) for rows, window in step.layers(variant)]
    return [*_embedding(step, variant), *chain(*layers), *_head(step, variant), *_pooler(step)]


def backward(step: Step, variant: Variant = OURS) -> list[Kernel]:
    """The backward pass of a micro-batch; with recomputation each layer's forward pass again."""
    layers = []
    for rows, window in reversed(step.layers(variant)):
        layers += layer_forward(step, rows, variant, window=window) if step.work.activation_checkpointing else []
        layers += layer_backward(step, rows, variant, window=window)
    ends = [*_head_backward(step, variant), *_pooler_backward(step, variant)]
    return [*ends, *layers, *_embedding_backward(step, variant)]


def reduction(step: Step) -> Kernel:
    """The copies of a step's gradients: two launches for each parameter and pass, at stage 0 one but for the first."""
    launches = len(step.work.shape.tensors()) * (
        2 * step.accumulation if step.work.stage > 0 else step.accumulation - 1
    )
    return Kernel("gradient reduction", 0.0, gradient_copies(step), launches)


def update(step: Step, variant: Variant = OURS) -> list[Kernel]:
    """Once a step: the gradients' norm and the optimizer; unfused ones clip and cast in passes of their own."""
    share = step.work.trained_parameters / (step.work.ranks if step.work.stage > 0 else 1)
    launches = 2.0 if variant.fused else 2 + share / MULTI_TENSOR
    clipping = FULL if variant.fused else 3 * FULL
    stepped = OPTIMIZERS.get(step.work.optimizer).step_bytes - FULL + (0 if variant.fused else FULL)
    return [
        Kernel("gradient clipping", 0.0, clipping * share, launches),
        Kernel("optimizer", 0.0, stepped * share, launches),
    ]


def passes(step: Step, variant: Variant = OURS) -> list[Kernel]:
    """All forward and backward passes of an optimizer step, and what brings their gradients together."""
    return [*[*forward(step, variant), *backward(step, variant)] * step.accumulation, reduction(step)]


def kernels(step: Step, variant: Variant = OURS) -> list[Kernel]:
    """All of an optimizer step."""
    return [*passes(step, variant), *update(step, variant)]


def gradient_copies(step: Step) -> float:
    """Bytes of memory that DeepSpeed and autograd move to sum gradients up and to reduce them.

    Stage 0 sums in the weights' precision, and our step reads that. Stage 1 adds to whole fp32 gradients, and flattens,
    rounds and widens those once a step. Stages 2 and 3 copy each micro-batch into a bucket, and widen and add the
    rank's share.
    """
    work, times = step.work, step.accumulation
    count, low = work.trained_parameters, work.width
    added = low + 2 * FULL
    if work.stage == 0:
        return float(count * ((times - 1) * 3 * low + (4 * low if work.ranks > 1 else 0)))
    if work.stage == 1:
        flat = 2 * FULL + 2 * (FULL + low) if work.ranks > 1 else 0
        return float(count * (times * (added + low) + flat))
    widened_and_added = (low + FULL) + 3 * FULL
    return times * count * (2 * low + widened_and_added / work.ranks)


def _embedding(step: Step, variant: Variant) -> list[Kernel]:
    """Look-ups of words, positions and segments, their sums, LayerNorm, dropout."""
    part, state, added = "embedding", step.tokens(variant) * step.work.shape.hidden, _tables(step) - 1
    return [
        sweep(step, part, state, 2),
        *[sweep(step, part, state, 1)] * added,
        *([sweep(step, part, state, 3 * added, launches=added)] if added else []),
        *norm(step, variant, part, state, residual=False),
    ]


def _tables(step: Step) -> int:
    """Tables that the embedding looks up: of words, and what the model has of positions and segments."""
    return 1 + int(step.work.shape.learned_positions) + int(step.work.shape.segments > 0)


def _embedding_backward(step: Step, variant: Variant) -> list[Kernel]:
    """Dropout, LayerNorm, scatters into zeros (sorted: some five launches each), the decoder's gradient added."""
    part, state, shape = "embedding", step.tokens(variant) * step.work.shape.hidden, step.work.shape
    scatters = sweep(step, part, state, 2 * _tables(step), launches=5 * _tables(step))
    table = sweep(step, part, shape.largest_parameter(), 1 + (3 if shape.decoder else 0), launches=2)
    return [*norm_backward(step, variant, part, state, residual=False), scatters, table]


def _head(step: Step, variant: Variant) -> list[Kernel]:
    """Dense, GELU, LayerNorm; decoder; the loss, whose bytes are those of both passes. Or a classifier of tokens."""
    part, rows, shape = "head and loss", step.head_rows(variant), step.work.shape
    if not shape.decoder:
        return [product(step, part, rows, shape.hidden, shape.classes)] if rows else []
    a_logit, launches = (LOGIT_BYTES, 4) if variant.fused else (PLAIN_LOGIT_BYTES, 7)
    return [
        product(step, part, rows, shape.hidden, shape.hidden),
        sweep(step, part, rows * shape.hidden, 2),
        *norm(step, variant, part, rows * shape.hidden, residual=False)[-1:],
        product(step, part, rows, shape.hidden, shape.vocabulary),
        Kernel(part, 0.0, a_logit * rows * shape.vocabulary, launches),
    ]


def _head_backward(step: Step, variant: Variant) -> list[Kernel]:
    """As `_head`; the loss's gradient is applied to the rows, to theirs, and to the bias's, which is cast then.

    The rows' gradients are put together with the pooler's: into zeros, summed, into the rows' order.
    """
    part, rows, shape = "head and loss", step.head_rows(variant), step.work.shape
    hidden, state = shape.hidden, step.behind_attention(variant)[-1] * shape.hidden
    together = sweep(step, part, state, 2 + 2 + 3 + 4, 7) if variant.packed else sweep(step, part, state, 1 + 3, 2)
    if not shape.decoder:
        return [*(linear_backward(step, variant, part, rows, hidden, shape.classes) if rows else []), together]
    return [
        *linear_backward(step, variant, part, rows, hidden, shape.vocabulary),
        *([sweep(step, part, rows * hidden, 4, launches=4)] if variant.fused else []),
        *norm_backward(step, variant, part, rows * hidden, residual=False)[:2],
        *activation_backward(step, variant, part, rows, hidden, hidden),
        together,
    ]


def _pooler(step: Step) -> list[Kernel]:
    """First tokens, dense, tanh, classifier, its loss."""
    part, rows, shape = "pooler and classifier", step.work.sequences, step.work.shape
    if not shape.pooler:
        return []
    return [
        sweep(step, part, rows * shape.hidden, 4, launches=9),
        product(step, part, rows, shape.hidden, shape.hidden),
        product(step, part, rows, shape.hidden, shape.classes),
    ]


def _pooler_backward(step: Step, variant: Variant) -> list[Kernel]:
    part, rows, shape = "pooler and classifier", step.work.sequences, step.work.shape
    if not shape.pooler:
        return []
    return [
        sweep(step, part, rows * shape.hidden, 3, launches=8),
        *linear_backward(step, variant, part, rows, shape.hidden, shape.classes),
        *linear_backward(step, variant, part, rows, shape.hidden, shape.hidden),
    ]
