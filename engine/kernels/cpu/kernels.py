"""The kernels on CPUs: calls into the C++ library, with the signatures of `engine.kernels.reference`.

The optimizer's buffers may also be lists with one tensor a segment instead of flat tensors, so the parameters of a
whole group are updated where they lie, in one call.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from engine.kernels.cpu.library import loaded
from engine.kernels.segments import Buffer, Segments
from engine.kernels.terms import Adam, Trust
from engine.precision import PRECISIONS

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
        ("grad_scale", ctypes.c_float),
        ("trust_clamp", ctypes.c_float),
        ("nvlamb", ctypes.c_bool),
    )


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
    """See `reference.softmax_cross_entropy_`; targets must be in range. Rows may be strided, not their elements."""
    rows, classes = logits.shape
    assert logits.stride(1) == 1 or classes == 1
    loss = torch.empty(rows, dtype=torch.float32)
    hit = torch.empty(rows, dtype=torch.bool)
    grad_bias = torch.empty(0 if bias is None or not gradient else classes, dtype=torch.float32)
    target, bias = target.contiguous(), None if bias is None else bias.contiguous()
    getattr(loaded(), f"softmax_cross_entropy_{PRECISIONS[logits.dtype]}")(
        logits.data_ptr(),
        logits.stride(0),
        None if bias is None else bias.data_ptr(),
        target.data_ptr(),
        scale.data_ptr(),
        rows,
        classes,
        ignore_index,
        label_smoothing,
        gradient,
        loss.data_ptr(),
        hit.data_ptr(),
        grad_bias.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, hit, grad_bias


def global_norm(grad: Buffer, segments: Segments) -> Tensor:
    """See `reference.global_norm`."""
    table = _Tables(segments, grad=grad)
    return torch.tensor(loaded().global_norm(table.pointer, table.kind("grad"), torch.get_num_threads()))


def adamw_step_(
    param: Buffer,
    grad: Buffer,
    exp_avg: Buffer,
    exp_avg_sq: Buffer,
    copy: Buffer | None,
    segments: Segments,
    adam: Adam,
    grad_scale: Tensor,
) -> Tensor:
    """See `reference.adamw_step_`."""
    table = _Tables(segments, param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, copy=copy)
    hyper = _hyper(adam, grad_scale)
    nonfinite = loaded().adamw_step(table.pointer, ctypes.byref(hyper), *table.kinds(), torch.get_num_threads())
    return torch.tensor(nonfinite, dtype=torch.int32)


def lamb_step_(
    param: Buffer,
    grad: Buffer,
    exp_avg: Buffer,
    exp_avg_sq: Buffer,
    copy: Buffer | None,
    segments: Segments,
    adam: Adam,
    grad_scale: Tensor,
    trust: Trust,
) -> tuple[Tensor, Tensor]:
    """See `reference.lamb_step_`."""
    table = _Tables(segments, param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, copy=copy)
    hyper = _hyper(adam, grad_scale, trust)
    ratio = torch.empty(len(segments.length), dtype=torch.float32)
    step = loaded().lamb_step
    nonfinite = step(table.pointer, ctypes.byref(hyper), *table.kinds(), ratio.data_ptr(), torch.get_num_threads())
    return torch.tensor(nonfinite, dtype=torch.int32), ratio


def lamb_moments_(
    param: Buffer,
    grad: Buffer,
    exp_avg: Buffer,
    exp_avg_sq: Buffer,
    segments: Segments,
    adam: Adam,
    grad_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.lamb_moments_`."""
    table = _Tables(segments, param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    hyper = _hyper(adam, grad_scale)
    squares = torch.empty((len(segments.length), 2), dtype=torch.float64)
    arguments = (table.kind("grad"), squares.data_ptr(), torch.get_num_threads())
    nonfinite = loaded().lamb_moments(table.pointer, ctypes.byref(hyper), *arguments)
    return torch.tensor(nonfinite, dtype=torch.int32), squares


def lamb_apply_(
    param: Buffer,
    grad: Buffer,
    exp_avg: Buffer,
    exp_avg_sq: Buffer,
    copy: Buffer | None,
    segments: Segments,
    adam: Adam,
    grad_scale: Tensor,
    ratio: Tensor,
    nonfinite: Tensor,
) -> None:
    """See `reference.lamb_apply_`."""
    table = _Tables(segments, param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, copy=copy)
    hyper = _hyper(adam, grad_scale)
    ratio = ratio.contiguous()
    arguments = (*table.kinds(), ratio.data_ptr(), int(nonfinite), torch.get_num_threads())
    loaded().lamb_apply(table.pointer, ctypes.byref(hyper), *arguments)


def _hyper(adam: Adam, grad_scale: Tensor, trust: Trust | None = None) -> _Hyper:
    trust = Trust() if trust is None else trust
    return _Hyper(_AdamStep(*adam.constants()), adam.lr, float(grad_scale), trust.bound, trust.nvlamb)


class _Tables:
    """The C view of a segment table and of the buffers that it cuts; keeps the addresses alive."""

    def __init__(self, segments: Segments, **buffers: Buffer | None) -> None:
        self.buffers = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        lists = {name: getattr(segments, name) for name in ("offset", "begin", "size", "owner", "first")}
        lists |= {"weight_decay": segments.weight_decay, "trust": segments.trust}
        self.addresses = {name: _addresses(buffer, segments) for name, buffer in self.buffers.items()}
        pointers = {name: tensor.data_ptr() for name, tensor in (lists | self.addresses).items()}
        self.table = _Table(**pointers, segments=len(segments.length), chunks=len(segments.begin))

    @property
    def pointer(self) -> Any:
        return ctypes.byref(self.table)

    def kind(self, name: str) -> int:
        """The number type of a buffer; 0 for no buffer too."""
        buffer = self.buffers.get(name)
        if buffer is None or not len(buffer):
            return 0
        return KINDS[buffer.dtype if isinstance(buffer, Tensor) else buffer[0].dtype]

    def kinds(self) -> tuple[int, int]:
        return self.kind("grad"), self.kind("copy")


def _addresses(buffer: Buffer, segments: Segments) -> Tensor:
    """[S] int64, where each segment starts in memory."""
    if isinstance(buffer, Tensor):
        assert buffer.is_contiguous()
        return buffer.data_ptr() + segments.offset * buffer.element_size()
    assert all(tensor.is_contiguous() for tensor in buffer)
    return torch.tensor([tensor.data_ptr() for tensor in buffer], dtype=torch.int64)
