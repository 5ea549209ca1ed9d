"""Layer normalisation with dropout and residual, and packed attention, on CPUs: calls into the C++ library.

Shape legend: T tokens, Q queries, H width, B sequences, A heads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kernels.cpu.kernels import loaded
from engine.kernels.cpu.library import library
from engine.precision import PRECISIONS

#: a head's width must be a multiple of a vector of so many numbers
LANES = 16


class _Dropout(ctypes.Structure):
    """`Dropout` of csrc/cpu/dropout.h."""

    _fields_ = (("seed", ctypes.c_uint32), ("threshold", ctypes.c_uint32), ("scale", ctypes.c_float))


class _NormRows(ctypes.Structure):
    """`NormRows` of csrc/cpu/layer_norm.cpp."""

    _fields_ = (
        ("rows", ctypes.c_longlong),
        ("width", ctypes.c_int),
        ("eps", ctypes.c_float),
        ("inner", _Dropout),
        ("outer", _Dropout),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "z", "out", "mean", "inv_std")),
    )


class _Attention(ctypes.Structure):
    """`Attention` of csrc/cpu/attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        ("stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("start", "length", "query_start", "query_length")),
        *((name, ctypes.c_int) for name in ("sequences", "heads", "width")),
        ("scale", ctypes.c_float),
        ("dropout", _Dropout),
        ("context", ctypes.c_void_p),
        ("log_sum", ctypes.c_void_p),
        ("queries", ctypes.c_longlong),
    )


class _AttentionGradients(ctypes.Structure):
    """`Gradients` of csrc/cpu/attention.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("grad", "query", "key", "value"))


@dataclass(frozen=True)
class Dropout:
    """Dropout by hashing: what an element's fate is a function of, beside its place."""

    probability: float
    seed: int

    def to_c(self) -> _Dropout:
        """The probability in steps of 2^-32, and the scale that belongs to exactly that."""
        threshold = round(self.probability * 2**32)
        return _Dropout(self.seed, threshold, 1.0 / (1.0 - threshold * 2.0**-32))


NO_DROPOUT = Dropout(0.0, 0)


def normalises(x: Tensor) -> bool:
    """Whether `layer_norm` takes tensors like `x`."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0


def attends(x: Tensor, heads: int) -> bool:
    """Whether `attention` takes queries [T, H] like `x`."""
    lib = library()
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[1] % (heads * LANES) == 0
    return fits and x.numel() > 0 and lib is not None and bool(lib.attention_usable())


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, inner: Dropout, outer: Dropout
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise `inner(x) + residual`, then apply `outer`.

    Args:
        x, residual: [T, H] fp32 or bf16; without a residual nothing of `x` may be dropped.
        weight, bias: [H], as `x`.

    Returns:
        the result [T, H]; what was normalised [T, H]; mean and 1 / standard deviation [2, T] fp32.
    """
    assert residual is not None or inner.probability == 0.0
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    z = x if residual is None else torch.empty_like(x)
    out, statistics = torch.empty_like(x), torch.empty(2, x.shape[0])
    rows = _norm_rows(x, residual, weight, bias, z, out, statistics, eps, inner, outer)
    _function("layer_norm", x)(ctypes.byref(rows), torch.get_num_threads())
    return out, z, statistics


def layer_norm_backward(
    grad: Tensor, z: Tensor, weight: Tensor, statistics: Tensor, inner: Dropout, outer: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and residual [T, H] (one tensor where nothing of x was dropped), weight and bias [H] fp32."""
    grad = grad.contiguous()
    grad_sum = torch.empty_like(z)
    grad_x = torch.empty_like(z) if inner.probability else grad_sum
    grad_weight, grad_bias = torch.empty(2, z.shape[1]).unbind()
    rows = _norm_rows(z, None, weight, weight, z, z, statistics, 0.0, inner, outer)
    buffers = (grad, grad_x, grad_sum, grad_weight, grad_bias)
    pointers = (tensor.data_ptr() for tensor in buffers)
    _function("layer_norm_backward", z)(ctypes.byref(rows), *pointers, torch.get_num_threads())
    return grad_x, grad_sum, grad_weight, grad_bias


def _norm_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    out: Tensor,
    statistics: Tensor,
    eps: float,
    inner: Dropout,
    outer: Dropout,
) -> _NormRows:
    buffers = (x, residual, weight, bias, z, out, *statistics.unbind())
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in buffers)
    return _NormRows(x.shape[0], x.shape[1], eps, inner.to_c(), outer.to_c(), *pointers)


@dataclass(frozen=True)
class Sequences:
    """Which tokens attend to which."""

    starts: Tensor
    """[B] int64, first token of each sequence"""
    lengths: Tensor
    """[B] int64, its tokens"""
    query_starts: Tensor
    """[B] int64, first of its tokens that are queries, among all queries"""
    query_lengths: Tensor
    """[B] int64, how many of its tokens are queries"""

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, read: Tensor | None = None) -> Sequences:
        """Each sequence to itself; only of the tokens `read` [R], in ascending order, where that is given."""
        if read is None:
            return cls(starts, lengths, starts, lengths)
        bounds = torch.cat((torch.searchsorted(read, starts), torch.tensor([len(read)])))
        return cls(starts, lengths, bounds[:-1], bounds.diff())


def attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, heads: int, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention of packed sequences.

    Args:
        query: [Q, H] bf16; key, value: [T, H] bf16.

    Returns:
        context [Q, H], zeros for queries behind the last sequence's; log-sum-exp of the scores [A, Q] fp32.
    """
    context = torch.empty_like(query)
    log_sum = torch.empty(heads, query.shape[0])
    call = _attention(query, key, value, sequences, dropout, context, log_sum)
    loaded().attention_forward(ctypes.byref(call), torch.get_num_threads())
    _clear_behind(sequences.query_lengths, context)
    return context, log_sum


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    dropout: Dropout,
    context: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [Q, H], key and value [T, H], zeros behind the last sequence."""
    grad = grad.contiguous()
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    call = _attention(query, key, value, sequences, dropout, context, log_sum)
    gradients = _AttentionGradients(grad.data_ptr(), *(tensor.data_ptr() for tensor in found))
    loaded().attention_backward(ctypes.byref(call), ctypes.byref(gradients), torch.get_num_threads())
    _clear_behind(sequences.query_lengths, found[0])
    _clear_behind(sequences.lengths, *found[1:])
    return found


def _clear_behind(lengths: Tensor, *tensors: Tensor) -> None:
    """Zero the rows of tokens that belong to no sequence."""
    tokens = int(lengths.sum())
    for tensor in tensors:
        tensor[tokens:].zero_()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    dropout: Dropout,
    context: Tensor,
    log_sum: Tensor,
) -> _Attention:
    places = (sequences.starts, sequences.lengths, sequences.query_starts, sequences.query_lengths)
    assert all(tensor.is_contiguous() for tensor in (query, key, value, *places))
    heads, queries = log_sum.shape
    width = query.shape[1] // heads
    return _Attention(
        *(tensor.data_ptr() for tensor in (query, key, value)),
        query.shape[1],
        *(tensor.data_ptr() for tensor in places),
        len(sequences.starts),
        heads,
        width,
        width**-0.5,
        dropout.to_c(),
        context.data_ptr(),
        log_sum.data_ptr(),
        queries,
    )


def _function(name: str, like: Tensor) -> Any:
    return getattr(loaded(), f"{name}_{PRECISIONS[like.dtype]}")
