"""What surrounds the matrix products of a Transformer layer: normalised residual sums and packed attention.

Dropout of our kernels is a hash of a seed that is drawn from torch's global generator, so masks are neither stored nor
read, and a resumed run drops the same; flash attention draws from the GPU's generator.

Shape legend: T tokens, Q queries, H width, B sequences, A heads.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels import cpu, dispatch
from engine.kernels.terms import EVERYWHERE, NO_DROPOUT, Dropout, Sequences, Window
from engine.kernels.varlen import varlen_attention


def normalised_sum(
    states: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    dropout: float = 0.0,
    output_dropout: float = 0.0,
) -> Tensor:
    """Layer normalisation (Ba et al. 2016) of `dropout(states) + residual`, and dropout of the result.

    Args:
        states, residual: [T, H]; without a residual `dropout` must be 0.
        weight, bias: [H].
        eps: added to the variance.

    Returns:
        [T, H].
    """
    kernels = dispatch.normalised_sum(states, residual, weight, bias)
    if kernels is not None:
        dropouts = (_drawn(dropout), _drawn(output_dropout))
        normalised: Tensor = _NormalisedSum.apply(states, residual, weight, bias, eps, *dropouts, kernels)
        return normalised
    summed = states if residual is None else F.dropout(states, dropout) + residual
    return F.dropout(F.layer_norm(summed, weight.shape, weight, bias, eps), output_dropout)


def added_norm(
    states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`states + residual`, and layer normalisation of that: a pre-norm Transformer's step from sub-layer to sub-layer.

    Args:
        states, residual: [T, H].
        weight, bias: [H].
        eps: added to the variance.

    Returns:
        the sum and the normalised sum, [T, H] each; their gradients are added in the same backward pass.
    """
    kernels = dispatch.normalised_sum(states, residual, weight, bias)
    if kernels is not None:
        both: tuple[Tensor, Tensor] = _AddedNorm.apply(states, residual, weight, bias, eps, kernels)
        return both
    summed = states + residual
    return summed, F.layer_norm(summed, weight.shape, weight, bias, eps)


def fused_attention(
    kernels: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    heads: int,
    *,
    dropout: float = 0.0,
    window: Window = EVERYWHERE,
) -> Tensor:
    """Attention (Vaswani et al. 2017) of each packed sequence to itself, without a padded grid.

    Args:
        kernels: what `dispatch.attention` says.
        query: [Q, H], heads side by side, of the tokens that ask; key, value: [T, H]. Each may have further rows.
        dropout: of the probabilities.
        window: tokens before and behind its own that a query sees. Every token must ask then, as flash attention
            takes the last query for the last token's.

    Returns:
        [Q, H], zeros for rows that are no query of a sequence.
    """
    if kernels is cpu:
        assert window == EVERYWHERE, "the CPU kernel knows no window"
        context: Tensor = _Attention.apply(query, key, value, sequences, heads, _drawn(dropout), kernels)
        return context
    states = (_first(query, sequences.queries), _first(key, sequences.tokens), _first(value, sequences.tokens))
    bounds = (sequences.query_bounds32, sequences.bounds32, sequences.longest, sequences.longest)
    attended: Tensor = varlen_attention(*states, *bounds, heads, dropout, *window)[0]
    behind = len(query) - sequences.queries
    return F.pad(attended, (0, 0, 0, behind)) if behind else attended


def rotary_attention(
    kernels: ModuleType,
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequences: Sequences,
    heads: int,
    *,
    read: Tensor | None = None,
    dropout: float = 0.0,
    window: Window = EVERYWHERE,
) -> Tensor:
    """`fused_attention` with rotary positions (Su et al. 2021), which cost no pass of their own.

    Args:
        kernels: what `dispatch.rotary_attention` says.
        projected: [T, 3 H], query, key and value of each token, heads side by side; there may be further rows.
        sequences: where every token asks.
        read: [Q] int64, the tokens that ask, in ascending order; all if absent.
        cos, sin: [T, H / A / 2] fp32; element i of a head turns with element i + H / A / 2.

    Returns:
        [Q, H], or as many rows as there are tokens, zeros for those of no sequence.
    """
    asking = sequences if read is None else sequences.asking(read)
    places = (projected, cos, sin, asking, None if read is None else read.contiguous(), heads)
    context: Tensor = _RotaryAttention.apply(*places, _drawn(dropout), window, kernels)
    return context


def _first(states: Tensor, rows: int) -> Tensor:
    """The first rows; the tensor itself where it has no others, which saves a copy in the backward pass."""
    return states[:rows] if len(states) > rows else states


def _drawn(probability: float) -> Dropout:
    """Dropout under a fresh seed of torch's generator; none is drawn where nothing is dropped."""
    return Dropout(probability, int(torch.randint(2**32, ()))) if probability else NO_DROPOUT


class _NormalisedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        inner: Dropout,
        outer: Dropout,
        kernels: ModuleType,
    ) -> Tensor:
        out: Tensor
        out, summed, statistics = kernels.layer_norm(states, residual, weight, bias, eps, inner, outer)
        ctx.save_for_backward(summed, weight, statistics)
        ctx.dropouts, ctx.has_bias, ctx.kernels = (inner, outer), bias is not None, kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        summed, weight, statistics = ctx.saved_tensors
        found = ctx.kernels.layer_norm_backward(grad, summed, weight, statistics, *ctx.dropouts)
        of_states, of_residual, *of_parameters = found
        needs_residual = of_residual if ctx.needs_input_grad[1] else None
        return of_states, needs_residual, *_typed(ctx, weight, *of_parameters), None, None, None, None


class _AddedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        kernels: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        terms = (weight, bias, eps, NO_DROPOUT, NO_DROPOUT)
        normalised, summed, statistics = kernels.layer_norm(states, residual, *terms)
        ctx.save_for_backward(summed, weight, statistics)
        ctx.has_bias, ctx.kernels = bias is not None, kernels
        ctx.set_materialize_grads(False)
        return summed, normalised

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_summed: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        summed, weight, statistics = ctx.saved_tensors
        if grad is None:
            return grad_summed, grad_summed, None, None, None, None
        terms = (summed, weight, statistics, NO_DROPOUT, NO_DROPOUT)
        of_states, of_residual, *of_parameters = ctx.kernels.layer_norm_backward(grad, *terms, grad_summed)
        return of_states, of_residual, *_typed(ctx, weight, *of_parameters), None, None


def _typed(ctx: Any, weight: Tensor, of_weight: Tensor, of_bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of a norm's parameters in the parameters' type."""
    return of_weight.to(weight.dtype), of_bias.to(weight.dtype) if ctx.has_bias else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        heads: int,
        dropout: Dropout,
        kernels: ModuleType,
    ) -> Tensor:
        context: Tensor
        context, log_sum = kernels.attention(query, key, value, sequences, heads, dropout)
        ctx.save_for_backward(query, key, value, context, log_sum)
        ctx.sequences, ctx.dropout, ctx.kernels = sequences, dropout, kernels
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, context, log_sum = ctx.saved_tensors
        arguments = (query, key, value, ctx.sequences, ctx.dropout, context, log_sum)
        return (*ctx.kernels.attention_backward(grad, *arguments), None, None, None, None)


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        cos: Tensor,
        sin: Tensor,
        sequences: Sequences,
        asking: Tensor | None,
        heads: int,
        dropout: Dropout,
        window: Window,
        kernels: ModuleType,
    ) -> Tensor:
        projected = projected.contiguous()
        context: Tensor
        context, log_sum = kernels.rotary_attention(projected, cos, sin, sequences, asking, heads, dropout, window)
        ctx.save_for_backward(projected, cos, sin, context, log_sum)
        ctx.terms, ctx.kernels = (sequences, asking, dropout, window), kernels
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *turned, context, log_sum = ctx.saved_tensors
        found: Tensor = ctx.kernels.rotary_attention_backward(grad, *turned, *ctx.terms, context, log_sum)
        return (found, *(None,) * 8)
