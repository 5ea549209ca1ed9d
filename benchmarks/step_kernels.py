"""What the kernels of a pre-training step compute and move, counted from what each reads and writes. Not measured.

A matrix product or a pass over memory is one entry; each operand is read once and each result written once, as if
caches were perfect within a kernel and empty between two. Only matrix products count as FLOPs. Attention is torch's
fused one in every variant (FlashAttention-2: Dao 2023; its backward pass computes the scores again). Weights and
activations are bf16; dropout masks take a byte an element, as torch keeps them on GPUs. Bytes of the loss's logits and
of the optimizer are those of `benchmarks.fused_loss --counts` and `benchmarks.optimizer_step --counts`; the copies of
gradients are those of DeepSpeed 0.19, as launch/forecast/states.py describes its optimizers.

Names: T tokens, H hidden size, I feed-forward size, B sequences, S their length, M masked rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import fused_loss, optimizer_step
from engine.config import Shape
from engine.model.flops import training_flops

#: bytes of a bf16 number, of an fp32 number
LOW, FULL = 2, 4
PARTS = (
    "embedding", "QKV projections", "attention", "output projection", "residual + LayerNorm", "FFN", "GELU",
    "MLM head and loss", "pooler and NSP", "gradient reduction", "gradient clipping", "optimizer",
)  # fmt: skip
#: elements that one launch of torch's multi-tensor kernels takes: 320 chunks of 65536 (ATen ForeachUtils, apex)
MULTI_TENSOR = 320 * 65536


@dataclass(frozen=True)
class Kernel:
    """One launch, or several that belong together; sums over all of them."""

    part: str
    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 1


@dataclass(frozen=True)
class Variant:
    """How a step is made."""

    name: str
    masked_rows: bool
    """the MLM head sees masked rows only, the last layer behind its attention those and first tokens, and no padding is
    computed outside of attention"""
    fused_loss: bool
    fused_optimizer: bool
    """unscaling, clipping and the bf16 copy in the step"""
    fused_norm: bool
    """dropout, residual sum and LayerNorm in one pass"""


PLAIN = Variant("plain torch", False, False, False, False)
OURS = Variant("ours", True, True, True, False)
#: as on CPUs; not written for GPUs
FUSED_NORM = Variant("ours, LayerNorm fused too", True, True, True, True)
VARIANTS = (PLAIN, OURS, FUSED_NORM)


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank."""

    shape: Shape
    length: int
    micro_batch: int
    accumulation: int = 1
    fill: float = 1.0
    """share of the padded grid that holds tokens"""
    masked: float = 0.15
    stage: int = 2
    ranks: int = 1
    optimizer: str = "adamw"

    def needed_flops(self) -> float:
        """FLOPs that the tokens need, padding and recomputed scores left out: what a share of the peak counts."""
        lengths = [round(self.fill * self.length)] * self.micro_batch
        return self.accumulation * training_flops(self.shape, lengths, self.masked * sum(lengths))

    def tokens(self, variant: Variant) -> float:
        """Of a micro-batch, as linear layers see them."""
        return self.micro_batch * self.length * (self.fill if variant.masked_rows else 1.0)

    def behind_attention(self, variant: Variant) -> list[float]:
        """Rows of a micro-batch that each layer's parts behind attention see."""
        tokens = self.tokens(variant)
        last = self.micro_batch + self.masked * tokens if variant.masked_rows else tokens
        return [tokens] * (self.shape.layers - 1) + [last]


def product(part: str, rows: float, inner: float, columns: float) -> Kernel:
    """[rows, inner] times [inner, columns]."""
    moved = LOW * (rows * inner + inner * columns + rows * columns)
    return Kernel(part, 2.0 * rows * inner * columns, moved)


def sweep(part: str, elements: float, tensors: float, launches: float = 1, masks: float = 0) -> Kernel:
    """Passes that read or write so many bf16 tensors, and one-byte masks, of so many elements."""
    return Kernel(part, 0.0, elements * (LOW * tensors + masks), launches)


def linear_backward(part: str, rows: float, inner: float, columns: float) -> list[Kernel]:
    """Gradients of the input, of the weight, and of the bias (a sum of its own in torch)."""
    of_bias = sweep(part, rows * columns, 1)
    return [product(part, rows, columns, inner), product(part, columns, rows, inner), of_bias]


def forward(step: Step, variant: Variant) -> list[Kernel]:
    """The forward pass of a micro-batch."""
    layers = [
        kernel
        for rows in step.behind_attention(variant)
        for kernel in (*_attention(step, variant, rows), *_feed_forward(step, variant, rows))
    ]
    return [*_embedding(step, variant), *layers, *_head(step, variant), *_pooler(step)]


def backward(step: Step, variant: Variant) -> list[Kernel]:
    """The backward pass of a micro-batch."""
    layers = [
        kernel
        for rows in reversed(step.behind_attention(variant))
        for kernel in (*_feed_forward_backward(step, variant, rows), *_attention_backward(step, variant, rows))
    ]
    ends = [*_head_backward(step, variant), *_pooler_backward(step, variant)]
    return [*ends, *layers, *_embedding_backward(step, variant)]


def update(step: Step, variant: Variant) -> list[Kernel]:
    """Once a step: gradients brought together, their norm, the optimizer."""
    share = step.shape.parameters() / (step.ranks if step.stage > 0 else 1)
    counted = optimizer_bytes(step.optimizer, variant.fused_optimizer)
    launches = 2.0 if variant.fused_optimizer else 2 + share / MULTI_TENSOR
    return [
        Kernel("gradient reduction", 0.0, gradient_copies(step), 2.0 * len(step.shape.tensors())),
        Kernel("gradient clipping", 0.0, counted["clipping adds"] * share, launches),
        Kernel("optimizer", 0.0, (counted["step"] + counted["16-bit copy adds"]) * share, launches),
    ]


def kernels(step: Step, variant: Variant) -> list[Kernel]:
    """All of an optimizer step."""
    passes = [*forward(step, variant), *backward(step, variant)]
    return [*passes * step.accumulation, *update(step, variant)]


def optimizer_bytes(optimizer: str, fused: bool) -> dict[str, float]:
    """Counted bytes a parameter; unfused are torch's AdamW(fused=True) and apex's FusedLAMB."""
    own = {"adamw": "AdamW, ours", "lamb": "LAMB, ours"}[optimizer]
    other = {"adamw": "AdamW, torch fused", "lamb": "LAMB, apex FusedLAMB"}[optimizer]
    table = optimizer_step.counts()[0]["rivals"]
    return next(values for name, values in table.items() if name.startswith(own if fused else other))


def logit_bytes(fused: bool) -> float:
    """Counted bytes a logit between the head's matrix products, forward and backward."""
    name = "ours, CUDA, row in registers" if fused else "torch, fp32 softmax"
    return float(fused_loss.counts()[0]["rivals"][name]["bytes a logit"])


def gradient_copies(step: Step) -> float:
    """Bytes of memory that DeepSpeed moves to sum bf16 gradients up in fp32 and to reduce them.

    Stage 0 widens in the step. Stage 1 adds to whole fp32 gradients, and flattens, rounds and widens those once a
    step. Stages 2 and 3 copy each micro-batch into a bucket, and widen and add the rank's share.
    """
    count, times = step.shape.parameters(), step.accumulation
    added = LOW + 2 * FULL
    if step.stage == 0:
        flat = 4 * LOW if step.ranks > 1 else 0
        return float(count * (LOW + FULL + flat))
    if step.stage == 1:
        flat = 2 * FULL + 2 * (FULL + LOW) if step.ranks > 1 else 0
        return float(count * (times * (added + LOW) + flat))
    widened_and_added = (LOW + FULL) + 3 * FULL
    return times * count * (2 * LOW + widened_and_added / step.ranks)


def _normalised(variant: Variant, part: str, elements: float) -> list[Kernel]:
    """Dropout, sum and LayerNorm: three passes of torch, or one that keeps the sum and no mask."""
    if variant.fused_norm:
        return [sweep(part, elements, 4)]
    return [sweep(part, elements, 2, masks=1), sweep(part, elements, 3), sweep(part, elements, 2)]


def _normalised_backward(variant: Variant, part: str, elements: float) -> list[Kernel]:
    """LayerNorm's gradients of its input, then of weight and bias, then dropout's; or both inputs' in one pass."""
    if variant.fused_norm:
        return [sweep(part, elements, 4, launches=2)]
    return [sweep(part, elements, 3), sweep(part, elements, 2), sweep(part, elements, 2, masks=1)]


def _attention(step: Step, variant: Variant, rows: float) -> list[Kernel]:
    """Three projections, attention, output projection, residual sum. Packed sequences go through a padded grid.

    What is behind attention sees `rows`; where these aren't all, context and residual are picked.
    """
    tokens, hidden = step.tokens(variant), step.shape.hidden
    scores = step.micro_batch * step.length**2
    state, grid = tokens * hidden, step.micro_batch * step.length * hidden
    found = [product("QKV projections", tokens, hidden, hidden)] * 3
    if variant.masked_rows and step.fill < 1:  # q, k, v: zeros, then rows copied there; the context's rows picked
        copies = [sweep("attention", grid, 1), sweep("attention", state, 2)] * 3
        found += [*copies, sweep("attention", state, 2)]
    statistics = FULL * step.micro_batch * step.length * step.shape.heads
    found.append(Kernel("attention", 4.0 * scores * hidden, LOW * 4 * grid + statistics))
    if rows < tokens:
        found += [sweep("output projection", rows * hidden, 2)] * 2
    found.append(product("output projection", rows, hidden, hidden))
    return [*found, *_normalised(variant, "residual + LayerNorm", rows * hidden)]


def _attention_backward(step: Step, variant: Variant, rows: float) -> list[Kernel]:
    """As `_attention`; five products where the forward pass has two, in three launches. Picked rows go into zeros."""
    tokens, hidden = step.tokens(variant), step.shape.hidden
    scores = step.micro_batch * step.length**2
    state, grid = tokens * hidden, step.micro_batch * step.length * hidden
    found = _normalised_backward(variant, "residual + LayerNorm", rows * hidden)
    found += linear_backward("output projection", rows, hidden, hidden)
    if rows < tokens:
        found += [sweep("output projection", state, 1), sweep("output projection", rows * hidden, 3)] * 2
    if variant.masked_rows and step.fill < 1:
        found += [sweep("attention", grid, 1), sweep("attention", state, 2 + 3 * 2, launches=4)]
    statistics = 2 * FULL * step.micro_batch * step.length * step.shape.heads
    found.append(Kernel("attention", 10.0 * scores * hidden, LOW * 8 * grid + statistics, 3))
    found += linear_backward("QKV projections", tokens, hidden, hidden) * 3
    found.append(sweep("QKV projections", state, 2 * 3, launches=2))  # three gradients of one input are summed
    return [*found, sweep("residual + LayerNorm", state, 3)]


def _feed_forward(step: Step, variant: Variant, rows: float) -> list[Kernel]:
    hidden, inner, branches = step.shape.hidden, step.shape.intermediate, step.shape.feed_forward_matrices - 1
    return [
        product("FFN", rows, hidden, branches * inner),
        sweep("GELU", rows * inner, 1 + branches),
        product("FFN", rows, inner, hidden),
        *_normalised(variant, "residual + LayerNorm", rows * hidden),
    ]


def _feed_forward_backward(step: Step, variant: Variant, rows: float) -> list[Kernel]:
    hidden, inner, branches = step.shape.hidden, step.shape.intermediate, step.shape.feed_forward_matrices - 1
    return [
        *_normalised_backward(variant, "residual + LayerNorm", rows * hidden),
        *linear_backward("FFN", rows, inner, hidden),
        sweep("GELU", rows * inner, 1 + 2 * branches),
        *linear_backward("FFN", rows, hidden, branches * inner),
        sweep("residual + LayerNorm", rows * hidden, 3),
    ]


def _embedding(step: Step, variant: Variant) -> list[Kernel]:
    """Three look-ups, two sums, LayerNorm, dropout."""
    state = step.tokens(variant) * step.shape.hidden
    looked_up = [sweep("embedding", state, 2)] + [sweep("embedding", state, 1)] * 2
    normalised = [sweep("embedding", state, 2)] + (
        [] if variant.fused_norm else [sweep("embedding", state, 2, masks=1)]
    )
    return [*looked_up, sweep("embedding", state, 6, launches=2), *normalised]


def _embedding_backward(step: Step, variant: Variant) -> list[Kernel]:
    """Dropout, LayerNorm, three scatters into zeros (sorted: some five launches each), the decoder's gradient added."""
    state = step.tokens(variant) * step.shape.hidden
    normalised = 3 if variant.fused_norm else 3 + 2 + 2
    scatters = sweep("embedding", state, 3 * 2, launches=3 * 5)
    table = sweep("embedding", step.shape.largest_parameter(), 1 + 3, launches=2)
    return [sweep("embedding", state, normalised, launches=2 + (not variant.fused_norm)), scatters, table]


def _rows(step: Step, variant: Variant) -> float:
    """Of the MLM head."""
    return step.tokens(variant) * (step.masked if variant.masked_rows else 1.0)


def _head(step: Step, variant: Variant) -> list[Kernel]:
    """Dense, GELU, LayerNorm; decoder; the loss, whose bytes are those of both passes."""
    part, rows, hidden, classes = "MLM head and loss", _rows(step, variant), step.shape.hidden, step.shape.vocabulary
    loss = Kernel(part, 0.0, logit_bytes(variant.fused_loss) * rows * classes, 4 if variant.fused_loss else 7)
    return [
        product(part, rows, hidden, hidden),
        sweep(part, rows * hidden, 2 + 2, launches=2),
        product(part, rows, hidden, classes),
        loss,
    ]


def _head_backward(step: Step, variant: Variant) -> list[Kernel]:
    """As `_head`; the rows' gradients go into zeros, or are all there, and are added to what comes from the pooler."""
    part, rows, hidden, classes = "MLM head and loss", _rows(step, variant), step.shape.hidden, step.shape.vocabulary
    found = linear_backward(part, rows, hidden, classes)
    if variant.fused_loss:
        found.append(sweep(part, rows * hidden, 4, launches=2))
    found.append(sweep(part, rows * hidden, 5 + 3, launches=3))
    found += linear_backward(part, rows, hidden, hidden)
    state = step.behind_attention(variant)[-1] * hidden
    scattered = sweep(part, state, 1) if variant.masked_rows else sweep(part, 0, 0, launches=0)
    return [*found, scattered, sweep(part, state, 3)]


def _pooler(step: Step) -> list[Kernel]:
    """First tokens, dense, tanh, NSP, its loss."""
    part, rows, hidden = "pooler and NSP", step.micro_batch, step.shape.hidden
    return [
        sweep(part, rows * hidden, 4, launches=9),
        product(part, rows, hidden, hidden),
        product(part, rows, hidden, 2),
    ]


def _pooler_backward(step: Step, variant: Variant) -> list[Kernel]:
    part, rows, hidden = "pooler and NSP", step.micro_batch, step.shape.hidden
    state = step.behind_attention(variant)[-1] * hidden  # the first tokens' gradients among zeros
    return [
        sweep(part, state, 1, launches=8),
        *linear_backward(part, rows, hidden, 2),
        *linear_backward(part, rows, hidden, hidden),
    ]
