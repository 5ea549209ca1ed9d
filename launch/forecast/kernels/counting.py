"""What the kernels of a step on a GPU compute and move, counted from what each reads and writes. Not measured.

A matrix product or a pass over memory is one entry; each operand is read once and each result written once, as if
caches were perfect within a kernel and empty between two. Only matrix products count as FLOPs. Attention is
FlashAttention-2 (Dao 2023): its backward pass computes the scores again, and sums the queries' gradients in fp32.
Where a workload's attention is "plain", scores are written and read in each of its passes.
Copies of gradients are those of DeepSpeed 0.19, as launch/forecast/states.py describes its optimizers.

Names: T tokens, H hidden size, I feed-forward size, B sequences, S their length, A heads, M rows that the head reads, R
rows that the last layer computes behind its attention (those and, for a pooler, first tokens), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.adapters.flops import step_flops
from launch.forecast.workload import Workload

#: bytes of an fp32 number
FULL = 4
PARTS = (
    "embedding", "QKV projections", "attention", "output projection", "residual + LayerNorm", "FFN", "GELU",
    "head and loss", "pooler and classifier", "gradient reduction", "gradient clipping", "optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch, or several that belong together; sums over all of them."""

    part: str
    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 1


@dataclass(frozen=True)
class Variant:
    """How a step is made; as it is here where nothing else is said."""

    name: str = "ours"
    packed: bool = True
    """no padding is computed, and of the last layer behind its keys and values only the rows that are read"""
    read_rows: bool = True
    """the head sees only the rows that it is to read"""
    fused: bool = True
    """one pass each for dropout + residual + LayerNorm, for bias + GELU, for the loss, and for unscaling + clipping +
    step + cast"""
    joint: bool = False
    """queries, keys and values by one product; and the host launches a graph instead of kernels"""
    score_bytes: float = FULL
    """of a score where attention is plain: torch's computes in fp32"""


OURS = Variant()


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank."""

    work: Workload
    accumulation: int = 1
    fill: float = 1.0
    """share of the padded grid that holds tokens; all sequences are taken to have the same length"""

    @property
    def length(self) -> float:
        """Tokens of a sequence."""
        return self.fill * self.work.sequence_length

    def needed_flops(self) -> float:
        """FLOPs that the tokens need, padding and recomputed scores left out: what a share of the peak counts."""
        lengths = [round(self.length)] * self.work.sequences
        rows = self.work.read_share * sum(lengths)
        given = (self.work.shape, lengths, rows, self.work.trained)
        return self.accumulation * step_flops(*given, to_words=self.work.passes > 1)

    def seen(self, variant: Variant) -> float:
        """Tokens of a sequence that are computed."""
        return self.length if variant.packed else self.work.sequence_length

    def met(self, variant: Variant, window: bool) -> float:
        """Keys that a query meets, on average."""
        seen = self.seen(variant)
        return self.work.shape.window_pairs(round(seen)) / round(seen) if window else seen

    def tokens(self, variant: Variant) -> float:
        """T."""
        return self.work.sequences * self.seen(variant)

    def head_rows(self, variant: Variant) -> float:
        """M; without a decoder none where the classifier reads pooled vectors."""
        return self.tokens(variant) * (self.work.read_share if variant.read_rows else 1.0)

    def behind_attention(self, variant: Variant) -> list[float]:
        """Rows of a micro-batch that each layer's parts behind keys and values see: in the last layer R."""
        tokens, first = self.tokens(variant), self.work.sequences if self.work.shape.pooler else 0
        last = min(tokens, first + self.work.read_share * tokens) if variant.packed else tokens
        return [tokens] * (self.work.shape.layers - 1) + [last]

    def layers(self, variant: Variant) -> list[tuple[float, bool]]:
        """Of each layer what `behind_attention` says, and whether it has a window, those that have one first."""
        rows = self.behind_attention(variant)
        return [(count, index < self.work.shape.windows) for index, count in enumerate(rows)]


def product(step: Step, part: str, rows: float, inner: float, columns: float) -> Kernel:
    """[rows, inner] times [inner, columns]; a bias is added in the product's epilogue."""
    moved = step.work.width * (rows * inner + inner * columns + rows * columns)
    return Kernel(part, 2.0 * rows * inner * columns, moved)


def sweep(step: Step, part: str, elements: float, tensors: float, launches: float = 1, masks: float = 0) -> Kernel:
    """Passes that read or write so many tensors, and one-byte masks, of so many elements."""
    return Kernel(part, 0.0, elements * (step.work.width * tensors + masks), launches)


def linear_backward(
    step: Step, variant: Variant, part: str, rows: float, inner: float, columns: float, *, bias: bool = True
) -> list[Kernel]:
    """Gradients of the input, of the weight, and of the bias: a sum of its own, ours in blocks, then of blocks."""
    of_bias = [sweep(step, part, rows * columns, 1, launches=2 if variant.fused else 1)] if bias else []
    return [product(step, part, rows, columns, inner), product(step, part, columns, rows, inner), *of_bias]


def activation_backward(
    step: Step,
    variant: Variant,
    part: str,
    rows: float,
    inner: float,
    columns: float,
    *,
    branches: int = 1,
    bias: bool = True,
) -> list[Kernel]:
    """GELU's gradient, and those of the linear map before it; or of two, where one gates the other.

    Where the activation's kernel adds the bias, it sums its gradient too, in a small launch more.
    """
    summed = variant.fused and bias
    activation = "GELU" if part == "FFN" else part
    return [
        sweep(step, activation, rows * columns, 1 + 2 * branches, launches=2 if summed else 1),
        *linear_backward(step, variant, part, rows, inner, columns, bias=bias and not summed) * branches,
    ]


def norm(step: Step, variant: Variant, part: str, elements: float, residual: bool = True) -> list[Kernel]:
    """LayerNorm, of a residual sum and dropout too: one pass that keeps the sum and no mask, or one for each."""
    dropped = step.work.dropout > 0
    if variant.fused:
        return [sweep(step, part, elements, 4 if residual else 2)]
    dropout = [sweep(step, part, elements, 2, masks=1)] if dropped else []
    return [*dropout, *([sweep(step, part, elements, 3)] if residual else []), sweep(step, part, elements, 2)]


def norm_backward(step: Step, variant: Variant, part: str, elements: float, residual: bool = True) -> list[Kernel]:
    """Gradients of input, residual, weight and bias in one pass and a small one; the first two differ by the mask.

    Or LayerNorm's of its input, then of weight and bias, then dropout's.
    """
    dropped = step.work.dropout > 0
    if variant.fused:
        return [sweep(step, part, elements, 4 if residual and dropped else 3, launches=2)]
    dropout = [sweep(step, part, elements, 2, masks=1)] if dropped else []
    return [sweep(step, part, elements, 3), sweep(step, part, elements, 2), *dropout]
