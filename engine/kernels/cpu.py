"""The kernels on CPUs: calls into the C++ library, with the signatures of `engine.kernels.reference`.

The optimizer's buffers may also be lists with one tensor a segment instead of flat tensors, so the parameters of a
whole group are updated where they lie, in one call.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from engine.kernels.cpu_library import library
from engine.kernels.reference import bias_corrections
from engine.kernels.segments import Segments

#: a flat buffer that the segments cut, or a contiguous tensor for each segment
Buffer: TypeAlias = Tensor | Sequence[Tensor]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Table(ctypes.Structure):
    """`Table` of csrc/cpu/optimizer.cpp."""

    _names = ("param", "grad", "exp_avg", "exp_avg_sq", "copy", "offset", "begin", "size", "owner", "first")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_names, "weight_decay", "trust")),
        ("segments", ctypes.c_int),
        ("chunks", ctypes.c_int),
    )


class _AdamStep(ctypes.Structure):
    """`AdamStep` of csrc/math.cuh."""

    _names = ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps")
    _fields_ = tuple((name, ctypes.c_float) for name in (*_names, "inv_correction1", "inv_sqrt_correction2"))


class _Hyper(ctypes.Structure):
    """`Hyper` of csrc/cpu/optimizer.cpp."""

    _fields_ = (
        ("adam", _AdamStep),
        ("lr", ctypes.c_float),
        ("trust_clamp", ctypes.c_float),
        ("nvlamb", ctypes.c_bool),
    )


def available() -> bool:
    """Whether the library is there, built now if need be."""
    return library() is not None


def softmax_cross_entropy_(
    logits: Tensor, target: Tensor, scale: Tensor, *, ignore_index: int, label_smoothing: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """See `reference.softmax_cross_entropy_`; targets must be in range. Rows may be strided, not their elements."""
    rows, classes = logits.shape
    assert logits.stride(1) == 1 or classes == 1
    loss = torch.empty(rows, dtype=torch.float32)
    hit = torch.empty(rows, dtype=torch.bool)
    target = target.contiguous()
    lib = library()
    assert lib is not None
    getattr(lib, f"softmax_cross_entropy_{NAMES[logits.dtype]}")(
        logits.data_ptr(),
        logits.stride(0),
        target.data_ptr(),
        scale.data_ptr(),
        rows,
        classes,
        ignore_index,
        label_smoothing,
        gradient,
        loss.data_ptr(),
        hit.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, hit


def global_norm(grad: Buffer, segments: Segments) -> Tensor:
    """See `reference.global_norm`."""
    lib = library()
    assert lib is not None
    addresses = _addresses(grad, segments)
    table = _table(segments, grad=addresses)
    return torch.tensor(lib.global_norm(ctypes.byref(table), KINDS[_dtype(grad)], torch.get_num_threads()))


def adamw_step_(
    param: Buffer,
    grad: Buffer,
    exp_avg: Buffer,
    exp_avg_sq: Buffer,
    copy: Buffer | None,
    segments: Segments,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    bias_correction: bool,
    grad_scale: Tensor,
) -> Tensor:
    """See `reference.adamw_step_`."""
    hyper = _hyper(lr, beta1, beta2, eps, step, bias_correction)
    return _step((param, grad, exp_avg, exp_avg_sq, copy), segments, hyper, grad_scale, None)


def lamb_step_(
    param: Buffer,
    grad: Buffer,
    exp_avg: Buffer,
    exp_avg_sq: Buffer,
    copy: Buffer | None,
    segments: Segments,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    bias_correction: bool,
    grad_scale: Tensor,
    trust_clamp: float | None,
    nvlamb: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.lamb_step_`."""
    hyper = _hyper(lr, beta1, beta2, eps, step, bias_correction)
    hyper.trust_clamp, hyper.nvlamb = math.inf if trust_clamp is None else trust_clamp, nvlamb
    ratio = torch.empty(len(segments.length), dtype=torch.float32)
    return _step((param, grad, exp_avg, exp_avg_sq, copy), segments, hyper, grad_scale, ratio), ratio


def _hyper(lr: float, beta1: float, beta2: float, eps: float, step: int, bias_correction: bool) -> _Hyper:
    correction1, correction2 = bias_corrections(beta1, beta2, step, bias_correction)
    adam = _AdamStep(beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, 1.0 / correction1, 1.0 / math.sqrt(correction2))
    return _Hyper(adam, lr)


def _step(
    buffers: tuple[Buffer, Buffer, Buffer, Buffer, Buffer | None],
    segments: Segments,
    hyper: _Hyper,
    grad_scale: Tensor,
    ratio: Tensor | None,
) -> Tensor:
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "copy")
    given = {name: buffer for name, buffer in zip(names, buffers, strict=True) if buffer is not None}
    addresses = {name: _addresses(buffer, segments) for name, buffer in given.items()}
    table = _table(segments, **addresses)
    lib = library()
    assert lib is not None
    nonfinite = lib.optimizer_step(
        ctypes.byref(table),
        ctypes.byref(hyper),
        grad_scale.data_ptr(),
        KINDS[_dtype(given["grad"])],
        KINDS[_dtype(given["copy"])] if "copy" in given else 0,
        None if ratio is None else ratio.data_ptr(),
        torch.get_num_threads(),
    )
    return torch.tensor(nonfinite, dtype=torch.int32)


def _table(segments: Segments, **addresses: Tensor) -> _Table:
    """The C view of a table; `addresses` are [S] int64, kept alive by the caller."""
    lists = {name: getattr(segments, name) for name in ("offset", "begin", "size", "owner", "first")}
    lists |= {"weight_decay": segments.weight_decay, "trust": segments.trust, **addresses}
    pointers = {name: tensor.data_ptr() for name, tensor in lists.items()}
    return _Table(**pointers, segments=len(segments.length), chunks=len(segments.begin))


def _addresses(buffer: Buffer, segments: Segments) -> Tensor:
    """[S] int64, where each segment starts in memory."""
    if isinstance(buffer, Tensor):
        assert buffer.is_contiguous()
        return buffer.data_ptr() + segments.offset * buffer.element_size()
    assert all(tensor.is_contiguous() for tensor in buffer)
    return torch.tensor([tensor.data_ptr() for tensor in buffer], dtype=torch.int64)


def _dtype(buffer: Buffer) -> torch.dtype:
    return buffer.dtype if isinstance(buffer, Tensor) else buffer[0].dtype
