"""Attention with rotary positions, on CPUs: calls into the C++ library.

Shape legend: T tokens, R rows (T or more), Q queries, H width, B sequences, A heads, D = H / A.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.cpu.layers import DropoutConstants
from engine.kernels.cpu.library import loaded
from engine.kernels.terms import Dropout, Sequences, Window
from engine.precision import PRECISIONS


class _Call(ctypes.Structure):
    """`Attention` of csrc/cpu/rotary_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("projected", "cos", "sin", "start", "length")),
        *((name, ctypes.c_void_p) for name in ("query_start", "query_length", "asking")),
        *((name, ctypes.c_int) for name in ("sequences", "heads", "width", "reach")),
        ("scale", ctypes.c_float),
        ("dropout", DropoutConstants),
        ("context", ctypes.c_void_p),
        ("log_sum", ctypes.c_void_p),
        ("queries", ctypes.c_longlong),
    )


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
    call = _call(projected, cos, sin, sequences, asking, dropout, window, context, log_sum)
    forward = getattr(loaded(), f"rotary_attention_{PRECISIONS[projected.dtype]}")
    forward(ctypes.byref(call), torch.get_num_threads())
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
    grad, found = grad.contiguous(), torch.empty_like(projected)
    call = _call(projected, cos, sin, sequences, asking, dropout, window, context, log_sum)
    backward = getattr(loaded(), f"rotary_attention_backward_{PRECISIONS[projected.dtype]}")
    backward(ctypes.byref(call), grad.data_ptr(), found.data_ptr(), torch.get_num_threads())
    found[sequences.tokens :].zero_()
    return found


def _call(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequences: Sequences,
    asking: Tensor | None,
    dropout: Dropout,
    window: Window,
    context: Tensor,
    log_sum: Tensor,
) -> _Call:
    before, behind = window
    assert before == behind, "the kernel knows windows with the query in their middle"
    places = (sequences.starts, sequences.lengths, sequences.query_starts, sequences.query_lengths)
    buffers = (projected, cos, sin, *places)
    asked = () if asking is None else (asking,)
    assert all(tensor.is_contiguous() for tensor in (*buffers, *asked, context, log_sum))
    assert cos.dtype == sin.dtype == torch.float32
    heads, queries = log_sum.shape
    width = context.shape[1] // heads
    return _Call(
        *(tensor.data_ptr() for tensor in buffers),
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
