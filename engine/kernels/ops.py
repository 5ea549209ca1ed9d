"""The kernels as operators of torch (`torch.ops.zerobert`), each with a fake for tracing.

Arguments and results are described in `engine.kernels.reference`. CUDA kernels never make the host wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from engine.kernels import reference
from engine.kernels.dispatch import backend
from engine.kernels.segments import Segments
from engine.kernels.terms import Adam, Trust


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Refuse targets on a CPU that are neither classes nor `ignore_index`.

    Raises:
        IndexError: there is one.
    """
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise IndexError(f"target {int(target[wrong][0])} is out of range for {classes} classes")


@custom_op("zerobert::softmax_cross_entropy_", mutates_args=("logits",))
def _softmax_cross_entropy_(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = backend(logits.device, "loss")
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "gradient": gradient,
    }
    if logits.device.type == "cpu":
        check_targets(target, logits.shape[1], ignore_index)
    elif kernels is not reference:  # which looks targets up in an operator of torch that asserts the same
        options["in_range"] = torch.ones((), dtype=torch.int32, device=logits.device)
    loss, hit, grad_bias = kernels.softmax_cross_entropy_(logits, bias, target, scale, **options)
    if "in_range" in options:
        torch._assert_async(options["in_range"], f"a target is out of range for {logits.shape[1]} classes")
    return loss, hit, grad_bias


@_softmax_cross_entropy_.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    loss = logits.new_empty(rows, dtype=torch.float32)
    summed = 0 if bias is None or not gradient else classes
    return loss, logits.new_empty(rows, dtype=torch.bool), logits.new_empty(summed, dtype=torch.float32)


@custom_op("zerobert::global_norm", mutates_args=())
def _global_norm(grad: Tensor, segments: Sequence[Tensor]) -> Tensor:
    norm: Tensor = backend(grad.device, "norm").global_norm(grad, Segments.from_tensors(segments))
    return norm


@_global_norm.register_fake
def _(grad: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((), dtype=torch.float32)


@custom_op("zerobert::adamw_step_", mutates_args=("param", "exp_avg", "exp_avg_sq", "copy"))
def _adamw_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Sequence[Tensor],
    adam: Sequence[float],
    grad_scale: Tensor,
) -> Tensor:
    table, terms = Segments.from_tensors(segments), Adam.unpack(adam)
    step = backend(param.device, "adamw").adamw_step_
    nonfinite: Tensor = step(param, grad, exp_avg, exp_avg_sq, copy, table, terms, grad_scale)
    return nonfinite


@_adamw_step_.register_fake
def _(param: Tensor, *_: Any) -> Tensor:
    return param.new_empty((), dtype=torch.int32)


@custom_op("zerobert::lamb_step_", mutates_args=("param", "exp_avg", "exp_avg_sq", "copy"))
def _lamb_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Sequence[Tensor],
    adam: Sequence[float],
    grad_scale: Tensor,
    trust_clamp: float | None,
    nvlamb: bool,
) -> tuple[Tensor, Tensor]:
    table, terms, trust = Segments.from_tensors(segments), Adam.unpack(adam), Trust(trust_clamp, nvlamb)
    step = backend(param.device, "lamb").lamb_step_
    nonfinite, ratio = step(param, grad, exp_avg, exp_avg_sq, copy, table, terms, grad_scale, trust)
    return nonfinite, ratio


@_lamb_step_.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Sequence[Tensor],
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return param.new_empty((), dtype=torch.int32), param.new_empty(segments[0].shape, dtype=torch.float32)


@custom_op("zerobert::lamb_moments_", mutates_args=("exp_avg", "exp_avg_sq"))
def _lamb_moments_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    segments: Sequence[Tensor],
    adam: Sequence[float],
    grad_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    table, terms = Segments.from_tensors(segments), Adam.unpack(adam)
    step = backend(param.device, "lamb").lamb_moments_
    nonfinite, squares = step(param, grad, exp_avg, exp_avg_sq, table, terms, grad_scale)
    return nonfinite, squares


@_lamb_moments_.register_fake
def _(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, segments: Sequence[Tensor], *_: Any
) -> tuple[Tensor, Tensor]:
    squares = param.new_empty((segments[0].shape[0], 2), dtype=torch.float64)
    return param.new_empty((), dtype=torch.int32), squares


@custom_op("zerobert::lamb_apply_", mutates_args=("param", "copy"))
def _lamb_apply_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Sequence[Tensor],
    adam: Sequence[float],
    grad_scale: Tensor,
    ratio: Tensor,
    nonfinite: Tensor,
) -> None:
    table, terms = Segments.from_tensors(segments), Adam.unpack(adam)
    step = backend(param.device, "lamb").lamb_apply_
    step(param, grad, exp_avg, exp_avg_sq, copy, table, terms, grad_scale, ratio, nonfinite)


@_lamb_apply_.register_fake
def _(*_: Any) -> None:
    return None


def softmax_cross_entropy_(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.softmax_cross_entropy_`; on GPUs without a bias.

    Raises:
        IndexError: a target is neither a class nor `ignore_index`; on a GPU an assertion fails there, without a wait
            here.
    """
    options = (ignore_index, label_smoothing, gradient)
    loss, hit, grad_bias = _softmax_cross_entropy_(logits, bias, target, scale, *options)
    return loss, hit, grad_bias


def global_norm(grad: Tensor, segments: Segments) -> Tensor:
    """See `reference.global_norm`."""
    norm: Tensor = _global_norm(grad, segments.tensors())
    return norm


def adamw_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Segments,
    adam: Adam,
    grad_scale: Tensor,
) -> Tensor:
    """See `reference.adamw_step_`."""
    table = segments.tensors()
    nonfinite: Tensor = _adamw_step_(param, grad, exp_avg, exp_avg_sq, copy, table, adam.pack(), grad_scale)
    return nonfinite


def lamb_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Segments,
    adam: Adam,
    grad_scale: Tensor,
    trust: Trust,
) -> tuple[Tensor, Tensor]:
    """See `reference.lamb_step_`."""
    terms = (segments.tensors(), adam.pack(), grad_scale, trust.clamp, trust.nvlamb)
    nonfinite, ratio = _lamb_step_(param, grad, exp_avg, exp_avg_sq, copy, *terms)
    return nonfinite, ratio


def lamb_moments_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    segments: Segments,
    adam: Adam,
    grad_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.lamb_moments_`."""
    terms = (segments.tensors(), adam.pack(), grad_scale)
    nonfinite, squares = _lamb_moments_(param, grad, exp_avg, exp_avg_sq, *terms)
    return nonfinite, squares


def lamb_apply_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Segments,
    adam: Adam,
    grad_scale: Tensor,
    ratio: Tensor,
    nonfinite: Tensor,
) -> None:
    """See `reference.lamb_apply_`."""
    terms = (segments.tensors(), adam.pack(), grad_scale, ratio, nonfinite)
    _lamb_apply_(param, grad, exp_avg, exp_avg_sq, copy, *terms)
