"""The kernels as operators of torch (`torch.ops.zerobert`), each with a fake for tracing, and the choice of backend.

Arguments and results are described in `engine.kernels.reference`. CUDA kernels never make the host wait.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.library import custom_op

from engine.kernels import reference
from engine.kernels.cpu import kernels as cpu
from engine.kernels.segments import Segments
from engine.kernels.terms import Adam, Trust

Kernels = Literal["auto", "fused", "reference"]

_selected: Kernels = "auto"

logger = logging.getLogger(__name__)


def select(kernels: Kernels) -> None:
    """Choose for this process.

    Args:
        kernels: "auto", our kernels, on a GPU once they have agreed there with plain torch; "fused", ours without that
            check; "reference", plain torch everywhere.
    """
    global _selected
    _selected = kernels


def backend(device: torch.device) -> ModuleType:
    """The module whose functions compute on `device`; plain torch where a back end can't be built or is wrong."""
    if _selected == "reference" or device.type not in ("cpu", "cuda"):
        return reference
    if device.type == "cpu":
        return cpu if cpu.available() else reference
    from engine.kernels.cuda import kernels as cuda

    usable = cuda.available() if _selected == "fused" else _agrees(device.index)
    return cuda if usable else reference


@functools.cache
def _agrees(index: int | None) -> bool:
    """Whether the CUDA kernels can be built and agree with plain torch on a GPU; if not, one line says why."""
    from engine.kernels.cuda import kernels as cuda
    from engine.kernels.cuda.selfcheck import disagreement

    if not torch.cuda.is_available() or not cuda.available():
        return False
    found = disagreement(cuda, torch.device("cuda", torch.cuda.current_device() if index is None else index))
    if found is not None:
        logger.warning("CUDA kernels: %s; plain torch runs instead", found)
    return found is None


def fused(device: torch.device) -> bool:
    """Whether our own kernels compute on `device`."""
    return backend(device) is not reference


def tensor_lists(device: torch.device) -> ModuleType | None:
    """The backend of `device` if its optimizer steps take lists of tensors as well as flat buffers, else None."""
    return cpu if backend(device) is cpu else None


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Refuse targets that are neither classes nor `ignore_index`.

    Raises:
        IndexError: at once on a CPU; on a GPU an assertion fails there, without a wait here.
    """
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if target.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"a target is out of range for {classes} classes")
    elif wrong.any():
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
    check_targets(target, logits.shape[1], ignore_index)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "gradient": gradient}
    loss, hit, grad_bias = backend(logits.device).softmax_cross_entropy_(logits, bias, target, scale, **options)
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
    norm: Tensor = backend(grad.device).global_norm(grad, Segments.from_tensors(segments))
    return norm


@_global_norm.register_fake
def _(grad: Tensor, segments: Sequence[Tensor]) -> Tensor:
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
    step = backend(param.device).adamw_step_
    nonfinite: Tensor = step(param, grad, exp_avg, exp_avg_sq, copy, table, terms, grad_scale)
    return nonfinite


@_adamw_step_.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Sequence[Tensor],
    adam: Sequence[float],
    grad_scale: Tensor,
) -> Tensor:
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
    step = backend(param.device).lamb_step_
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
    adam: Sequence[float],
    grad_scale: Tensor,
    trust_clamp: float | None,
    nvlamb: bool,
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
    step = backend(param.device).lamb_moments_
    nonfinite, squares = step(param, grad, exp_avg, exp_avg_sq, table, terms, grad_scale)
    return nonfinite, squares


@_lamb_moments_.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    segments: Sequence[Tensor],
    adam: Sequence[float],
    grad_scale: Tensor,
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
    step = backend(param.device).lamb_apply_
    step(param, grad, exp_avg, exp_avg_sq, copy, table, terms, grad_scale, ratio, nonfinite)


@_lamb_apply_.register_fake
def _(
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
        IndexError: a target is neither a class nor `ignore_index`.
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
