"""Attention of packed sequences, with rotary positions or without, on CPUs: calls into the C++ library.

Shape legend: T tokens, R rows (T or more), Q queries, H width, B sequences, A heads, D = H / A.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from engine.kernels.cpu.layers import DropoutConstants, attends_bf16, attention_backward_bf16, attention_bf16
from engine.kernels.cpu.library import loaded
from engine.kernels.terms import EVERYWHERE, Dropout, Sequences, Window
from engine.precision import PRECISIONS


class _Call(ctypes.Structure):
    """`Attention` of csrc/cpu/packed_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        ("stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "start", "length")),
        *((name, ctypes.c_void_p) for name in ("query_start", "query_length", "asking")),
        *((name, ctypes.c_int) for name in ("sequences", "heads", "width", "reach")),
        ("scale", ctypes.c_float),
        ("dropout", DropoutConstants),
        ("context", ctypes.c_void_p),
        ("log_sum", ctypes.c_void_p),
        ("queries", ctypes.c_longlong),
    )


class _Gradients(ctypes.Structure):
    """`Gradients` of csrc/cpu/packed_attention.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("query", "key", "value"))


def attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, heads: int, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention of packed sequences.

    Args:
        query: [Q, H] fp32 or bf16; key, value: [T, H]. Each may have further rows.

    Returns:
        context [Q, H], zeros for queries behind the last sequence's; log-sum-exp of the scores [A, Q] fp32.
    """
    if _in_bf16(query):
        return attention_bf16(query, key, value, sequences, heads, dropout)
    context, log_sum = torch.empty_like(query), torch.empty(heads, len(query))
    call = _call((query, key, value), None, sequences, None, dropout, EVERYWHERE, context, log_sum)
    _function("", query)(ctypes.byref(call), torch.get_num_threads())
    context[sequences.queries :].zero_()
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
    if _in_bf16(query):
        return attention_backward_bf16(grad, query, key, value, sequences, dropout, context, log_sum)
    grad = grad.contiguous()
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    call = _call((query, key, value), None, sequences, None, dropout, EVERYWHERE, context, log_sum)
    gradients = _Gradients(*(tensor.data_ptr() for tensor in found))
    _function("_backward", query)(ctypes.byref(call), grad.data_ptr(), ctypes.byref(gradients), torch.get_num_threads())
    for tensor, rows in zip(found, (sequences.queries, sequences.tokens, sequences.tokens), strict=True):
        tensor[rows:].zero_()
    return found


def _in_bf16(query: Tensor) -> bool:
    """Whether the kernel that multiplies bf16 takes these, which is faster."""
    return query.dtype == torch.bfloat16 and attends_bf16()


def rotary_attention(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequences: Sequences,
    asking: Tensor | None,
    heads: int,
    dropout: Dropout,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention of packed sequences whose queries and keys turn by their positions' angles.

    Args:
        projected: [R, 3 H] fp32 or bf16: query, key and value of each token, heads side by side.
        cos, sin: [T, D / 2] fp32.
        asking: [Q] int64, the token that each query is, as `sequences` has them; None where every token asks.
        window: as many tokens before as behind its own that a query sees.

    Returns:
        context [Q, H], or [R, H] with zeros behind the last sequence; log-sum-exp of the scores [A, Q] fp32.
    """
    rows, width = projected.shape
    rows = rows if asking is None else len(asking)
    context, log_sum = projected.new_empty(rows, width // 3), torch.empty(heads, rows)
    call = _call(_parts(projected), (cos, sin), sequences, asking, dropout, window, context, log_sum)
    _function("", projected)(ctypes.byref(call), torch.get_num_threads())
    context[sequences.queries :].zero_()
    return context, log_sum


def rotary_attention_backward(
    grad: Tensor,
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequences: Sequences,
    asking: Tensor | None,
    dropout: Dropout,
    window: Window,
    context: Tensor,
    log_sum: Tensor,
) -> Tensor:
    """Gradient of `projected` [R, 3 H], zeros behind the last sequence; grad: as the context."""
    if asking is not None and not len(asking):
        return torch.zeros_like(projected)
    grad, found = grad.contiguous(), torch.empty_like(projected)
    call = _call(_parts(projected), (cos, sin), sequences, asking, dropout, window, context, log_sum)
    gradients = _Gradients(*(tensor.data_ptr() for tensor in _parts(found)))
    backward = _function("_backward", projected)
    backward(ctypes.byref(call), grad.data_ptr(), ctypes.byref(gradients), torch.get_num_threads())
    found[sequences.tokens :].zero_()
    return found


def _parts(projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [R, H] of [R, 3 H], without a copy."""
    query, key, value = projected.chunk(3, 1)
    return query, key, value


def _function(way: str, states: Tensor) -> Any:
    """The forward ("") or "_backward" pass in the precision of the states."""
    return getattr(loaded(), f"packed_attention{way}_{PRECISIONS[states.dtype]}")


def _call(
    states: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor] | None,
    sequences: Sequences,
    asking: Tensor | None,
    dropout: Dropout,
    window: Window,
    context: Tensor,
    log_sum: Tensor,
) -> _Call:
    """states: query, key and value, whose rows are as far apart; angles: cosines and sines."""
    before, behind = window
    assert before == behind, "the kernel knows windows with the query in their middle"
    stride = states[0].stride(0)
    assert all(tensor.stride() == (stride, 1) for tensor in states)
    turns = angles or ()
    assert all(tensor.dtype == torch.float32 for tensor in turns)
    places = (sequences.starts, sequences.lengths, sequences.query_starts, sequences.query_lengths)
    asked = () if asking is None else (asking,)
    assert all(tensor.is_contiguous() for tensor in (*turns, *places, *asked, context, log_sum))
    heads, queries = log_sum.shape
    width = context.shape[1] // heads
    return _Call(
        *(tensor.data_ptr() for tensor in states),
        stride,
        *((tensor.data_ptr() for tensor in angles) if angles else (None, None)),
        *(tensor.data_ptr() for tensor in places),
        None if asking is None else asking.data_ptr(),
        len(sequences.starts),
        heads,
        width,
        before,
        width**-0.5,
        DropoutConstants(*dropout.constants()),
        context.data_ptr(),
        log_sum.data_ptr(),
        queries,
    )
