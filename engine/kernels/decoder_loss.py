"""Cross-entropy of a linear decoder: the projection to the vocabulary, its softmax and its loss as one operator.

The matrix products are torch's. The logits are written once: the row kernel turns them into the loss and, in place,
into their gradient, from which the backward pass makes its two products. Neither fp32 logits nor probabilities of
their own exist, and the gradient that arrives at the loss is applied to the hidden states, the smallest factor.
On CPUs the row kernel also adds the bias and sums its gradient; on GPUs the matrix product's epilogue adds it for less.
There the products have zeros for classes beyond the last, up to sizes at which they are fast; weight and bias are
copied with them. No kernel and no caller sees the logits of these classes.

Shape legend: N rows, H hidden size, V vocabulary size, P padded vocabulary size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F  # noqa: N812

from engine.kernels import dispatch
from engine.kernels.ops import softmax_cross_entropy_

#: bytes of logits above which rows are worked off in chunks
LOGIT_BYTES = 1 << 30
#: fp16 can't hold gradients near 1 / V; its slopes are kept this many times as large
FP16_SCALE = 256.0
#: the class of a row that doesn't count
IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
    return_hits: bool = False,
    logit_bytes: int = LOGIT_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T + bias`, differentiable once in hidden, weight and bias.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V] or None; all fp32, bf16 or fp16.
        target: [N] int64 classes, or `ignore_index` for rows that don't count.
        label_smoothing: share of the target distribution that is spread evenly over the vocabulary.
        reduction: "sum", or "mean" over the rows that count (NaN if none does).
        return_hits: also return how many rows that count have their target as the first most probable class.
        logit_bytes: rows are worked off in chunks whose logits take at most this much memory. The gradient of the
            weight is then summed over the chunks in fp32.

    Returns:
        fp32 scalar in nats; with `return_hits`, that and an int64 scalar.

    Raises:
        IndexError: a target is neither a class nor `ignore_index` (on a GPU, an assertion on the device).
    """
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    rows = max(1, logit_bytes // max(1, weight.shape[0] * hidden.element_size()))
    arguments = (hidden, weight, bias, target, ignore_index, label_smoothing, gradient)
    whole = rows >= hidden.shape[0]
    loss, hits, *_ = _whole(*arguments) if whole else _chunked(*arguments, rows)
    if reduction == "mean":
        loss = loss / (target != ignore_index).sum()
    return (loss, hits) if return_hits else loss


def slope_scale(hidden: Tensor) -> float:
    """What the stored gradient of the logits is multiplied by, so that it survives its own precision."""
    return FP16_SCALE if hidden.dtype == torch.float16 else 1.0


def padded_classes(weight: Tensor) -> int:
    """The classes of the products with a decoder's weight [V, H]."""
    unit = dispatch.class_unit(weight.device)
    return -(-weight.shape[0] // unit) * unit


def padded(tensor: Tensor, classes: int) -> Tensor:
    """A weight [V, H] or bias [V] with zeros up to [P, ...]; itself where there is nothing to pad."""
    missing = classes - tensor.shape[0]
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor


def _loss_and_slope(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: int,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed loss and hits of some rows; with `gradient`, what their logits turned into and the bias's gradient.

    Weight [P, H] and bias are padded, and so are the logits, [N, P], 0 behind the `classes` that there are. Both
    gradients are scaled; that of the bias is [V] fp32, or empty.
    """
    late = bias[:classes] if bias is not None and dispatch.adds_bias(hidden.device) else None
    logits = F.linear(hidden, weight, bias if late is None else None)
    scale = torch.full((), slope_scale(hidden), device=hidden.device)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "gradient": gradient}
    rows = logits[:, :classes]
    loss, hit, grad_bias = softmax_cross_entropy_(rows, late, target, scale, **options)  # type: ignore[arg-type]
    if gradient and bias is not None and late is None:
        grad_bias = _sum_over_rows(logits)[:classes]
    return loss.sum(), hit.sum(), logits, grad_bias


def _sum_over_rows(x: Tensor) -> Tensor:
    kernels = dispatch.column_sum(x)
    total: Tensor = x.sum(0, dtype=torch.float32) if kernels is None else kernels.column_sum(x, torch.float32)
    return total


@custom_op("zerobert::linear_cross_entropy", mutates_args=())
def _whole(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, hits, and scaled gradients of the logits [N, P] and of the bias [V] fp32 (empty without `gradient`)."""
    classes = padded_classes(weight)
    wide, wide_bias = padded(weight, classes), None if bias is None else padded(bias, classes)
    options = (weight.shape[0], ignore_index, label_smoothing, gradient)
    loss, hits, slope, grad_bias = _loss_and_slope(hidden, wide, wide_bias, target, *options)
    return loss, hits, slope if gradient else slope.new_empty(0, slope.shape[1]), grad_bias


@_whole.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    classes, rows = weight.shape[0], hidden.shape[0] if gradient else 0
    grad_bias = hidden.new_empty(classes if gradient and bias is not None else 0, dtype=torch.float32)
    slope = hidden.new_empty(rows, padded_classes(weight))
    return loss, hidden.new_empty((), dtype=torch.int64), slope, grad_bias


def _save_whole(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight = inputs[:2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, *output[2:])


def _backward_whole(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    hidden, weight, slope, grad_bias = ctx.saved_tensors
    factor = grad_loss / slope_scale(hidden)
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_hidden = (slope @ padded(weight, slope.shape[1])) * factor if need_hidden else None
    grad_weight = (slope.t() @ (hidden * factor))[: len(weight)] if need_weight else None
    return (
        grad_hidden,
        grad_weight,
        (grad_bias * factor).to(weight.dtype) if need_bias else None,
        None,
        None,
        None,
        None,
    )


_whole.register_autograd(_backward_whole, setup_context=_save_whole)


@custom_op("zerobert::chunked_linear_cross_entropy", mutates_args=())
def _chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_whole`, in chunks of `rows`; the gradients, made here since no logits stay, are of the summed loss.

    Returns:
        loss, hits, and scaled gradients of hidden [N, H], of weight [V, H] fp32 and of bias [V] fp32 (empty if None).
    """
    grads = _empty_gradients(hidden, weight, bias, gradient)
    grad_hidden, grad_weight, grad_bias = grads[0], grads[1].zero_(), grads[2].zero_()
    loss = hidden.new_zeros((), dtype=torch.float32)
    hits = torch.zeros((), dtype=torch.int64, device=hidden.device)
    classes, padding = weight.shape[0], padded_classes(weight)
    weight, bias = padded(weight, padding), None if bias is None else padded(bias, padding)
    options = (classes, ignore_index, label_smoothing, gradient)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        found = _loss_and_slope(hidden[part], weight, bias, target[part], *options)
        chunk_loss, chunk_hits, slope, slope_of_bias = found
        loss, hits = loss + chunk_loss, hits + chunk_hits
        if gradient:
            torch.mm(slope, weight, out=grad_hidden[part])
            grad_weight += (slope.t() @ hidden[part])[:classes]
            grad_bias += slope_of_bias
    return loss, hits, grad_hidden, grad_weight, grad_bias


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    some = int(gradient)
    grad_weight = weight.new_empty(some * weight.shape[0], weight.shape[1], dtype=torch.float32)
    grad_bias = weight.new_empty(0 if bias is None else some * weight.shape[0], dtype=torch.float32)
    return hidden.new_empty(some * hidden.shape[0], hidden.shape[1]), grad_weight, grad_bias


@_chunked.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    hits = hidden.new_empty((), dtype=torch.int64)
    return loss, hits, *_empty_gradients(hidden, weight, bias, gradient)


def _save_chunked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.slope_scale = slope_scale(hidden)
    ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    ctx.save_for_backward(*output[2:])


def _backward_chunked(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    factor = grad_loss / ctx.slope_scale
    gradients = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    scaled = [(tensor * factor).to(dtype) if needed else None for tensor, dtype, needed in gradients]
    return (*scaled, None, None, None, None, None)


_chunked.register_autograd(_backward_chunked, setup_context=_save_chunked)
