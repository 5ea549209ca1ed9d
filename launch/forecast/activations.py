"""What a forward pass keeps for the backward pass, and what a backward pass needs beside it, in bytes.

All sequences are taken to be full: packed batches of shorter ones have fewer tokens, and their grids of queries, keys
and values are as large. Names: e bytes an element, T tokens, H hidden size, I feed-forward size, B sequences, S their
length, A heads, M rows that the head reads (MLM's: the masked ones), R rows that the last layer computes behind its
attention (those and first tokens), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.model.adapters.trained import Matrix, Trained
from launch.forecast.workload import Workload

#: `engine.kernels.decoder_loss.LOGIT_BYTES`: more logits than this are worked off in chunks
LOGIT_BYTES = 1 << 30
FP32 = 4


@dataclass(frozen=True)
class Pass:
    """Bytes of a micro-batch's forward and backward pass, without weights and their gradients."""

    kept: int
    """embeddings and encoder, when the backward pass starts"""
    head: int
    """rows and logits of the head, and MLM's decoder's gradient while that is made"""
    layer: int
    """what the widest backward pass of a layer needs beside `kept`, when the head's rows and logits are gone"""
    end: int
    """when the backward pass reaches the embeddings"""

    @property
    def peak(self) -> int:
        return max(self.kept + max(self.head, self.layer), self.end)


def passes(work: Workload) -> Pass:
    """The bytes of a micro-batch's passes."""
    made = _passes(work)
    noise = 2 * FP32 * work.tokens * work.shape.hidden if work.passes > 1 else 0  # with its gradient
    return replace(made, kept=made.kept + noise, end=made.end + noise)


def _passes(work: Workload) -> Pass:
    """Without the noise that passes are under."""
    layers, read = work.shape.layers - work.first_layer, _read(work)
    if layers == 0:
        return Pass(0, head_bytes(work), 0, 0)
    if work.activation_checkpointing:
        # The first layer's input is the embeddings' output; one layer at a time is computed again.
        encoder = (layers - 1) * _hidden(work)
    else:  # without the last layer's output, which is the head's
        encoder = (layers - 1) * layer_bytes(work) + layer_bytes(work, read) - _hidden(work, read) + partial_bytes(work)
    layer = _tied_gradient(work) + _widest_backward(work)
    if work.trains_embeddings:
        return Pass(embedding_bytes(work) + encoder, head_bytes(work), layer, _end_bytes(work))
    return Pass(_hidden(work) + encoder, head_bytes(work), layer, 2 * _hidden(work))


def _read(work: Workload) -> int:
    """R."""
    return min(work.tokens, (work.sequences if work.shape.pooler else 0) + work.rows)


def _hidden(work: Workload, rows: int | None = None) -> int:
    """e T H, a hidden state; or that of so many rows."""
    return work.width * (work.tokens if rows is None else rows) * work.shape.hidden


def _mask(work: Workload, elements: int, width: int) -> int:
    """A dropout mask: on CPUs torch keeps it as factors in the input's precision, on GPUs as one byte an element."""
    return elements * (width if work.accelerator == "cpu" else 1) if work.dropout > 0 else 0


def _norm_mask(work: Workload, rows: int) -> int:
    """Of a LayerNorm's dropout over so many rows: our kernels draw it again from a hash."""
    return 0 if work.kernels else _mask(work, rows * work.shape.hidden, work.width)


def _norm_statistics(rows: int) -> int:
    """Mean and reciprocal deviation of a LayerNorm."""
    return 2 * FP32 * rows


def layer_bytes(work: Workload, rows: int | None = None) -> int:
    """What one Transformer layer keeps; the last one keeps only `rows` of the tokens behind its attention.

    In fp32: its attention; of each of its two residual outputs the mask and the LayerNorm's input; the two LayerNorms'
    outputs, which are inputs of linear layers; input and output of GELU, or where the feed-forward network is gated
    both branches, the activation and the product. With masks of one byte and without attention's scores that is the
    34 T H of Korthikanti et al. 2022, equation 2, in 16 bits. Our kernels keep no masks of these; those on CPUs, and
    in 16 bits on GPUs, don't keep the gated network's activation.
    """
    rows = work.tokens if rows is None else rows
    hidden = _hidden(work, rows)
    picked = hidden if rows < work.tokens else 0  # of the context, which attention keeps whole
    branches = _branches(work)
    gated_at_once = work.kernels and (work.accelerator == "cpu" or work.precision != "fp32")
    inner = branches + 1 if gated_at_once else 2 * branches
    feed_forward = work.width * rows * inner * work.shape.intermediate
    norms = 2 * (_norm_mask(work, rows) + _norm_statistics(rows))
    return attention_bytes(work) + picked + 4 * hidden + feed_forward + norms


def attention_bytes(work: Workload) -> int:
    """Queries, keys, values and context; "plain" also keeps probabilities, mask and what is left of them.

    torch's plain attention computes in fp32 whatever the precision is, and keeps fp32 queries, keys and values.
    """
    hidden, shape = _hidden(work), work.shape
    if work.attention == "flash":
        return 4 * hidden + FP32 * work.tokens * shape.heads
    scores = work.sequences * shape.heads * work.sequence_length**2
    dropped = _mask(work, scores, FP32) + FP32 * scores if work.dropout > 0 else 0
    return 3 * FP32 * work.tokens * shape.hidden + hidden + FP32 * scores + dropped


def partial_bytes(work: Workload) -> int:
    """What layers keep more where a part of the weights is trained, in all: what adapters keep, without the inputs of
    linear layers that a frozen weight doesn't need. Attention keeps that of its own output's projection.
    """
    trained, kept = work.trained, 0
    if trained is None:
        return 0
    for layer in range(work.first_layer, work.shape.layers):
        rows = _read(work) if layer == work.shape.layers - 1 else work.tokens
        matrices = {name: matrix for matrix in trained.matrices() for name in matrix.names}
        projections = [matrices[name] for name in ("query", "key", "value")]
        if not any(trained.keeps_input(matrix, layer) for matrix in projections):
            kept -= work.tokens * work.shape.hidden
        for name in ("feed-forward-input", "feed-forward-output"):
            kept -= 0 if trained.keeps_input(matrices[name], layer) else rows * matrices[name].inputs
        for matrix in {*matrices.values()}:
            seen = rows if matrix.names[0].startswith(("attention", "feed")) else work.tokens
            kept += seen * _adapter_states(trained, matrix) if trained.adapts(matrix, layer) else 0
    return work.width * kept


def _adapter_states(trained: Trained, matrix: Matrix) -> int:
    """Elements a row: LoRA's inner states, DoRA's two products, what ia3 scales, a bottleneck's input and what is
    before and behind its GELU."""
    method = trained.adapter.method
    if method == "ia3":
        return 0 if trained.scales_input(matrix) else matrix.outputs
    if method == "houlsby":
        return matrix.outputs + 2 * trained.adapter.bottleneck
    return trained.rank + (2 * matrix.outputs if method == "dora" else 0)


def _branches(work: Workload) -> int:
    """Matrices that the feed-forward network multiplies its input by: 2 where one gates the other."""
    return work.shape.feed_forward_matrices - 1


def embedding_bytes(work: Workload) -> int:
    """The LayerNorm's input, the mask, the output, and three int64 index tensors."""
    indices = 3 * 8 * work.tokens
    return 2 * _hidden(work) + _norm_mask(work, work.tokens) + _norm_statistics(work.tokens) + indices


def _tied_gradient(work: Workload) -> int:
    """The decoder's weight gradient, [V, H]: autograd holds it until the embedding's own arrives, at the very end."""
    return work.width * work.shape.largest_parameter() if work.shape.decoder else 0


def head_bytes(work: Workload) -> int:
    """At the decoder's backward pass: M rows before and after the transform, its GELU, their gradients; logits.

    Without a decoder: the classifier's inputs and logits with their gradients.

    The logits are kept in the model's precision, in place as their gradient; beyond LOGIT_BYTES only a chunk of them
    exists, and the decoder's gradient is summed in fp32 beside the one of the chunk.
    """
    vocabulary, rows = work.shape.vocabulary, work.rows
    if not work.shape.decoder:
        return 2 * (rows or work.sequences) * (work.width * work.shape.hidden + FP32 * work.shape.classes)
    logits = work.width * rows * vocabulary
    if logits > LOGIT_BYTES:
        logits = LOGIT_BYTES + FP32 * work.shape.largest_parameter()
    states = 7 * work.width * rows * work.shape.hidden
    return logits + states + FP32 * vocabulary + _tied_gradient(work)


def _widest_backward(work: Workload) -> int:
    """What the backward pass of the last layer or of the one before needs beside all that is kept."""
    read, again = _read(work), work.activation_checkpointing
    last = layer_bytes(work, read)
    behind = last - attention_bytes(work)
    gradients = 5 * _hidden(work) - behind  # of context, residual, queries, keys and values, with what is behind gone
    widest = (last if again else 0) + max(_feed_forward_backward(work, read), gradients)
    if work.shape.layers - work.first_layer == 1:
        return widest
    released = _hidden(work) - layer_bytes(work) if again else last
    return max(widest, _feed_forward_backward(work, work.tokens) - released)


def _feed_forward_backward(work: Workload, rows: int) -> int:
    """Gradients of GELU's output (gated: of both branches), of the residual, and of the last weight."""
    shape = work.shape
    return work.width * (
        rows * (_branches(work) * shape.intermediate + shape.hidden) + shape.intermediate * shape.hidden
    )


def _end_bytes(work: Workload) -> int:
    """The embeddings' dense gradients beside the decoder's, if there is one."""
    positions = work.width * (work.shape.positions + work.shape.segments) * work.shape.hidden
    words = work.width * work.shape.largest_parameter()
    return words + _tied_gradient(work) + positions + 2 * _hidden(work)
