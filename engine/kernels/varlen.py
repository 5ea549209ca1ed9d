"""Attention of packed sequences as operators of torch: flash attention on GPUs, plain torch on CPUs.

Arguments and results are described in `engine.kernels.reference`. Neither direction makes the host wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from engine.kernels import reference
from engine.kernels.cuda import attention as flash

#: context, log-sum-exps and the state of the random numbers
Attended = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


@custom_op("zerobert::varlen_attention", mutates_args=(), device_types="cpu")
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    heads: int,
    dropout: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.varlen_attention`; gradients of the context alone."""
    sizes = (longest_query, longest_key, heads, dropout, left, right)
    return reference.varlen_attention(query, key, value, query_bounds, key_bounds, *sizes)


@varlen_attention.register_kernel("cuda")
def _(*arguments: Any) -> Attended:
    return flash.varlen_attention(*arguments)


@varlen_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    heads: int,
    *_: Any,
) -> Attended:
    log_sum = query.new_empty((heads, query.shape[0]), dtype=torch.float32)
    random, unused = (query.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return query.new_empty(query.shape), log_sum, random, unused


@custom_op("zerobert::varlen_attention_backward", mutates_args=(), device_types="cpu")
def varlen_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    log_sum: Tensor,
    random: Tensor,
    unused: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    heads: int,
    dropout: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.varlen_attention_backward`."""
    kept = (context, log_sum, random, unused, query_bounds, key_bounds)
    sizes = (longest_query, longest_key, heads, dropout, left, right)
    return reference.varlen_attention_backward(grad, query, key, value, *kept, *sizes)


@varlen_attention_backward.register_kernel("cuda")
def _(*arguments: Any) -> Gradients:
    return flash.varlen_attention_backward(*arguments)


@varlen_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Gradients:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Attended) -> None:
    query, key, value, query_bounds, key_bounds, *ctx.sizes = inputs
    ctx.save_for_backward(query, key, value, *output, query_bounds, key_bounds)
    ctx.mark_non_differentiable(*output[1:])
    # Or each backward pass would fill a gradient of zeros for them.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (2 + len(ctx.sizes))
    if grad is None:
        return (None, None, None, *rest)
    return (*varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.sizes), *rest)


varlen_attention.register_autograd(_backward, setup_context=_setup_context)
