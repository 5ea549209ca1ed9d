"""What surrounds a layer's matrix products, on CPUs: calls into the C++ library, and oneDNN's product with a bias.

Shape legend: T tokens, Q queries, H width, B sequences, A heads, I inputs, O outputs, V vocabulary size.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from engine.kernels.cpu.library import loaded
from engine.kernels.terms import Dropout, Sequences
from engine.precision import PRECISIONS

#: a head's width must be a multiple of a vector of so many numbers
LANES = 16


class DropoutConstants(ctypes.Structure):
    """`Dropout` of csrc/dropout.cuh."""

    _fields_ = (("seed", ctypes.c_uint32), ("threshold", ctypes.c_uint32), ("scale", ctypes.c_float))


class _NormRows(ctypes.Structure):
    """`NormRows` of csrc/cpu/layer_norm.cpp."""

    _fields_ = (
        ("rows", ctypes.c_longlong),
        ("width", ctypes.c_int),
        ("eps", ctypes.c_float),
        ("inner", DropoutConstants),
        ("outer", DropoutConstants),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "z", "out", "mean", "inv_std")),
    )


class _AttentionCall(ctypes.Structure):
    """`Attention` of csrc/cpu/attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        ("stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("start", "length", "query_start", "query_length")),
        *((name, ctypes.c_int) for name in ("sequences", "heads", "width")),
        ("scale", ctypes.c_float),
        ("dropout", DropoutConstants),
        ("context", ctypes.c_void_p),
        ("log_sum", ctypes.c_void_p),
        ("queries", ctypes.c_longlong),
    )


class _AttentionGradients(ctypes.Structure):
    """`Gradients` of csrc/cpu/attention.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("grad", "query", "key", "value"))


def attends_bf16() -> bool:
    """Whether this CPU has the instructions that `attention_bf16` needs: AVX512-BF16."""
    return bool(loaded().attention_usable())


@functools.cache
def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this CPU: it needs AVX-512 or newer, and fails without."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    inner: Dropout,
    outer: Dropout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise `inner(x) + residual`, then apply `outer`.

    Args:
        x, residual: [T, H] fp32 or bf16; without a residual nothing of `x` may be dropped.
        weight, bias: [H], as `x`; no bias is one of zeros.

    Returns:
        the result [T, H]; what was normalised [T, H]; mean and 1 / standard deviation [2, T] fp32.
    """
    assert residual is not None or inner.probability == 0.0
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    bias = torch.zeros_like(weight) if bias is None else bias
    z = x if residual is None else torch.empty_like(x)
    out, statistics = torch.empty_like(x), torch.empty(2, x.shape[0])
    rows = _norm_rows(x, residual, weight, bias, z, out, statistics, eps, inner, outer)
    _function("layer_norm", x)(ctypes.byref(rows), torch.get_num_threads())
    return out, z, statistics


def layer_norm_backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    statistics: Tensor,
    inner: Dropout,
    outer: Dropout,
    grad_z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and residual [T, H] (one tensor where nothing of x was dropped), weight and bias [H] fp32.

    Args:
        grad: [T, H], of the result; grad_z: [T, H], of what was normalised, where that was read too.
        z, statistics: from `layer_norm`.
    """
    grad, grad_z = grad.contiguous(), None if grad_z is None else grad_z.contiguous()
    grad_sum = torch.empty_like(z)
    grad_x = torch.empty_like(z) if inner.probability else grad_sum
    grad_weight, grad_bias = torch.empty(2, z.shape[1]).unbind()
    rows = _norm_rows(z, None, weight, weight, z, z, statistics, 0.0, inner, outer)
    buffers = (grad, grad_z, grad_x, grad_sum, grad_weight, grad_bias)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in buffers)
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
    return _NormRows(
        x.shape[0],
        x.shape[1],
        eps,
        DropoutConstants(*inner.constants()),
        DropoutConstants(*outer.constants()),
        *pointers,
    )


def attention_bf16(
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
    call = _attention_call(query, key, value, sequences, dropout, context, log_sum)
    loaded().attention_forward(ctypes.byref(call), torch.get_num_threads())
    _clear_behind(sequences.queries, context)
    return context, log_sum


def attention_backward_bf16(
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
    call = _attention_call(query, key, value, sequences, dropout, context, log_sum)
    gradients = _AttentionGradients(grad.data_ptr(), *(tensor.data_ptr() for tensor in found))
    loaded().attention_backward(ctypes.byref(call), ctypes.byref(gradients), torch.get_num_threads())
    _clear_behind(sequences.queries, found[0])
    _clear_behind(sequences.tokens, *found[1:])
    return found


def _clear_behind(rows: int, *tensors: Tensor) -> None:
    """Zero the rows of tokens that belong to no sequence."""
    for tensor in tensors:
        tensor[rows:].zero_()


def _attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    dropout: Dropout,
    context: Tensor,
    log_sum: Tensor,
) -> _AttentionCall:
    places = (sequences.starts, sequences.lengths, sequences.query_starts, sequences.query_lengths)
    assert all(tensor.is_contiguous() for tensor in (query, key, value, *places))
    assert all(tensor.dtype == torch.bfloat16 for tensor in (query, key, value))
    heads, queries = log_sum.shape
    width = query.shape[1] // heads
    return _AttentionCall(
        *(tensor.data_ptr() for tensor in (query, key, value)),
        query.shape[1],
        *(tensor.data_ptr() for tensor in places),
        len(sequences.starts),
        heads,
        width,
        width**-0.5,
        DropoutConstants(*dropout.constants()),
        context.data_ptr(),
        log_sum.data_ptr(),
        queries,
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`, bf16; x: [T, I], weight: [O, I], bias: [O]."""
    # What Inductor calls for a linear layer on CPUs; it adds the bias while the product is still in registers.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of `x + bias`, bf16 on CPUs; x: [T, O], bias: [O]."""
    out = torch.empty_like(x)
    _call("gelu_bf16", (x, bias, out), *x.shape)
    return out


def gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [T, O] and of bias [O] in `gelu(x, bias)`."""
    grad_x, grad_bias = torch.empty_like(x), torch.empty(x.shape[1])
    _call("gelu_backward_bf16", (grad, x, bias, grad_x, grad_bias), *x.shape)
    return grad_x, grad_bias.to(bias.dtype)


def geglu(x: Tensor) -> Tensor:
    """GELU of the first half of each row times the second half, fp32 or bf16; [T, 2 O] to [T, O]."""
    out = x.new_empty(len(x), x.shape[1] // 2)
    _call(f"geglu_{PRECISIONS[x.dtype]}", (x, out), *out.shape)
    return out


def geglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x [T, 2 O] in `geglu(x)`; grad: [T, O]."""
    grad_x = torch.empty_like(x)
    _call(f"geglu_backward_{PRECISIONS[x.dtype]}", (grad, x, grad_x), *grad.shape)
    return grad_x


def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, O] bf16 to [O] in `dtype`, the sum over rows in fp32."""
    total = torch.empty(x.shape[1])
    _call("column_sum_bf16", (x, total), *x.shape)
    return total.to(dtype)


def add_rows(table: Tensor, ids: Tensor, values: Tensor, left_out: int | None = None) -> None:
    """`table[ids] += values` in place, bf16 on CPUs, with fp32 sums of the values of one id.

    Args:
        table: [V, H]; ids: [T] int64; values: [T, H]; left_out: an id whose values aren't added.
    """
    places, order = ids.sort(stable=True)
    if left_out is not None:
        kept = places != left_out
        places, order = places[kept], order[kept]
    _call("add_rows_bf16", (table, values.contiguous(), places, order), len(places), table.shape[1])


def _call(name: str, tensors: tuple[Tensor, ...], rows: int, width: int) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors)
    pointers = (tensor.data_ptr() for tensor in tensors)
    getattr(loaded(), name)(*pointers, rows, width, torch.get_num_threads())


def _function(name: str, like: Tensor) -> Any:
    return getattr(loaded(), f"{name}_{PRECISIONS[like.dtype]}")
