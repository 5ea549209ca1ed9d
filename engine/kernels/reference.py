"""Plain-torch versions of the kernels: the oracle of their tests, and what runs where no kernel can.

Formulas: softmax cross-entropy with label smoothing (Szegedy et al. 2016, section 7); AdamW (Loshchilov & Hutter 2019,
algorithm 2); LAMB (You et al. 2020, algorithm 2, with L2 norms); attention (Vaswani et al. 2017, section 3.2).
Shape legend: R rows, V classes, N elements, S segments, Q queries, T tokens, H width, A heads, B sequences.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from engine.kernels.segments import Segments
from engine.kernels.terms import EVERYWHERE, Adam, Dropout, Trust

#: the hash of dropout works modulo this, and spreads row and column numbers by the other
WORD = 2**32
GOLDEN = 0x9E3779B9


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
    """Cross-entropy of each row of `logits + bias`, and its gradient in place of the logits.

    Args:
        logits: [R, V] fp32, bf16 or fp16; with `gradient`, overwritten by d(loss)/d(logits) * scale.
        bias: [V] of the logits' type, added in fp32; None for none.
        target: [R] int64 classes, or `ignore_index` for rows of loss and gradient 0.
        scale: [] fp32.
        label_smoothing: share of the target distribution that is spread evenly over the classes.

    Returns:
        loss [R] fp32, in nats; hit [R] bool, whether the target is the first maximum (never with a NaN in the row);
        the scaled gradient of the bias, [V] fp32 (empty without a bias or `gradient`).
    """
    classes = logits.shape[1]
    kept = target != ignore_index
    index = target.where(kept, 0)[:, None]
    x = logits.float() if bias is None else logits.float() + bias.float()
    log_probability = x.log_softmax(-1)
    picked = log_probability.gather(1, index).squeeze(1)
    loss = -(1.0 - label_smoothing) * picked
    if label_smoothing > 0.0:
        loss = loss - label_smoothing * log_probability.mean(-1)
    best = (x == x.amax(-1, keepdim=True)).int().argmax(-1)
    hit = kept & (best == target) & ~x.isnan().any(-1)
    grad_bias = torch.empty(0, device=logits.device)
    if gradient:
        slope = log_probability.exp_() - label_smoothing / classes
        slope.scatter_add_(1, index, slope.new_full(index.shape, label_smoothing - 1.0))
        slope = (slope * scale).where(kept[:, None], 0.0)
        logits.copy_(slope)
        grad_bias = slope.sum(0) if bias is not None else grad_bias
    return loss.where(kept, 0.0), hit, grad_bias


def global_norm(grad: Tensor, segments: Segments) -> Tensor:
    """L2 norm, [] fp32, of the elements of `grad` ([N] fp32, bf16 or fp16) that lie in segments."""
    norms = [grad[part].double().norm() for part in segments.ranges()]
    return torch.stack(norms).norm().float() if norms else grad.new_zeros((), dtype=torch.float32)


def adam_direction_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: Adam,
    grad_scale: Tensor,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """Update the moments of one segment where the scaled gradient is finite.

    Returns:
        finite [n] bool and the update direction of `direction` [n].
    """
    beta1, rest1, beta2, rest2, *_ = adam.constants()
    scaled = grad.float() * grad_scale
    finite = scaled.isfinite()
    exp_avg.copy_(torch.where(finite, beta1 * exp_avg + rest1 * scaled, exp_avg))
    exp_avg_sq.copy_(torch.where(finite, beta2 * exp_avg_sq + rest2 * scaled * scaled, exp_avg_sq))
    return finite, direction(param, exp_avg, exp_avg_sq, adam, weight_decay)


def direction(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Adam, weight_decay: float) -> Tensor:
    """mhat / (sqrt(vhat) + eps) + weight_decay * param, [n], from moments that are updated already."""
    *_, eps, inv_correction1, inv_sqrt_correction2 = adam.constants()
    denominator = exp_avg_sq.sqrt() * inv_sqrt_correction2 + eps
    return exp_avg * inv_correction1 / denominator + weight_decay * param


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
    """One AdamW step over every segment.

    Args:
        param, exp_avg, exp_avg_sq: [N] fp32, updated in place.
        grad: [N] fp32, bf16 or fp16, left alone.
        copy: [N] bf16 or fp16, receives the new weights; None for no copy.
        grad_scale: [] fp32, multiplies the gradients: loss unscaling times clipping.

    Returns:
        [] int32, 1 if a scaled gradient was not finite. Such an element keeps its weight and moments.
    """
    nonfinite = torch.zeros((), dtype=torch.int32, device=param.device)
    for part, decay in zip(segments.ranges(), segments.weight_decay.tolist(), strict=True):
        buffers = (param[part], grad[part], exp_avg[part], exp_avg_sq[part])
        finite, update = adam_direction_(*buffers, adam, grad_scale, decay)
        _apply(param[part], None if copy is None else copy[part], update * adam.lr, finite)
        nonfinite |= (~finite).any()
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
    """One LAMB step over every segment, each a whole parameter; arguments as in `adamw_step_`.

    Returns:
        nonfinite as in `adamw_step_`; ratio [S] fp32, the trust ratio of each segment.
    """
    nonfinite, squares = lamb_moments_(param, grad, exp_avg, exp_avg_sq, segments, adam, grad_scale)
    ratio = trust_ratios(squares, segments.scaled(trust), trust)
    lamb_apply_(param, grad, exp_avg, exp_avg_sq, copy, segments, adam, grad_scale, ratio, nonfinite)
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
    """The first half of a LAMB step: the moments. Segments may be parts of parameters.

    Returns:
        nonfinite as in `adamw_step_`; squares [S, 2] fp64, the squared norms of the weights and of the update
        direction, to be summed over the parts of a parameter.
    """
    nonfinite = torch.zeros((), dtype=torch.int32, device=param.device)
    squares = torch.zeros((len(segments.length), 2), dtype=torch.float64, device=param.device)
    for index, (part, decay) in enumerate(zip(segments.ranges(), segments.weight_decay.tolist(), strict=True)):
        buffers = (param[part], grad[part], exp_avg[part], exp_avg_sq[part])
        finite, update = adam_direction_(*buffers, adam, grad_scale, decay)
        squares[index, 0] = param[part].double().square().sum()
        squares[index, 1] = update.where(finite, 0.0).double().square().sum()
        nonfinite |= (~finite).any()
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
    """The second half of a LAMB step: the weights.

    Args:
        ratio: [S] fp32, the trust ratio of each segment's parameter.
        nonfinite: what `lamb_moments_` returned.
    """
    for index, (part, decay) in enumerate(zip(segments.ranges(), segments.weight_decay.tolist(), strict=True)):
        update = direction(param[part], exp_avg[part], exp_avg_sq[part], adam, decay)
        finite = (grad[part].float() * grad_scale).isfinite()
        _apply(param[part], None if copy is None else copy[part], update * (adam.lr * ratio[index]), finite)


def trust_ratios(squares: Tensor, scaled: Tensor, trust: Trust) -> Tensor:
    """|weights| / |update| of parameters, [P] fp32, at most the clamp; 1 where either is 0 or `scaled` [P] is false.

    Args:
        squares: [P, 2] fp64, squared norms of weights and update direction.
    """
    weights, updates = squares.sqrt().unbind(-1)
    ratio = torch.where((weights > 0) & (updates > 0), weights / updates, 1.0).clamp(max=trust.bound)
    return ratio.where(scaled, 1.0).float()


def _apply(param: Tensor, copy: Tensor | None, change: Tensor, finite: Tensor) -> None:
    """Subtract `change` where `finite`, and refresh the low-precision copy."""
    param.sub_(change.where(finite, 0.0))
    if copy is not None:
        copy.copy_(param)


def dropout_factors(dropout: Dropout, rows: Tensor, columns: int) -> Tensor:
    """What our kernels' dropout multiplies elements by: 0, or the scale; csrc/dropout.cuh in 64-bit integers.

    Args:
        rows: [R] int64, the rows' numbers among all that is dropped under one seed.

    Returns:
        [R, columns] fp32.
    """
    seed, threshold, scale = dropout.constants()
    keys = hash32(seed ^ hash32(rows + GOLDEN))
    places = torch.arange(columns, device=rows.device) * GOLDEN % WORD
    return torch.where(hash32(keys[:, None] ^ places) >= threshold, scale, 0.0).float()


def hash32(x: Tensor) -> Tensor:
    """The hash of csrc/dropout.cuh, of int64 taken modulo 2^32."""
    x = x % WORD
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) % WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) % WORD
    return x ^ (x >> 16)


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
    """Scaled dot-product attention of each packed sequence's queries to its tokens.

    Args:
        query: [Q, H], heads side by side; key, value: [T, H].
        query_bounds, key_bounds: [B + 1] int32, first row of each sequence, and Q or T behind them.
        longest_query, longest_key: the largest number of rows of a sequence, or more.
        dropout: of the probabilities; its masks are drawn from torch's global generator of the device.
        left, right: how many tokens before and behind its own a query sees (a window of 128 has 64 and 64); -1 for all.
            With a window every token asks: a query's own token is known by its row alone.

    Returns:
        context [Q, H]; log-sum-exp of the scores, fp32 (on CPUs [A, Q]); two tensors that the backward pass draws the
        same masks from.
    """
    assert (left, right) == EVERYWHERE or query.shape[0] == key.shape[0], "with a window every token asks"
    seed = int(torch.randint(2**62, ())) if dropout else 0
    generator = torch.Generator().manual_seed(seed)
    context, log_sum = torch.zeros_like(query), query.new_zeros((heads, len(query)), dtype=torch.float32)
    for asking, asked in zip(_ranges(query_bounds), _ranges(key_bounds), strict=True):
        scores = _scores(query[asking], key[asked], heads, left, right)
        kept = scores.softmax(-1) * _kept(scores, dropout, generator)
        log_sum[:, asking] = scores.logsumexp(-1).float()
        context[asking] = _merged(kept @ _split(value[asked], heads)).to(context.dtype)
    state = torch.tensor([seed, 0], dtype=torch.uint64)
    return context, log_sum, state, torch.zeros((), dtype=torch.uint64)


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
    """Gradients of query [Q, H], key and value [T, H], from the context's and what the forward pass returned."""
    generator = torch.Generator().manual_seed(random.tolist()[0])
    gradients = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for asking, asked in zip(_ranges(query_bounds), _ranges(key_bounds), strict=True):
        scores = _scores(query[asking], key[asked], heads, left, right)
        probability, kept = scores.softmax(-1), _kept(scores, dropout, generator)
        of_context, true_context = _split(grad[asking], heads), _split(context[asking], heads)
        of_kept = of_context @ _split(value[asked], heads).mT
        mean = (of_context * true_context).sum(-1, keepdim=True)
        of_scores = probability * (of_kept * kept - mean) / math.sqrt(query.shape[1] // heads)
        found = (
            of_scores @ _split(key[asked], heads),
            of_scores.mT @ _split(query[asking], heads),
            (probability * kept).mT @ of_context,
        )
        for gradient, rows, part in zip(gradients, (asking, asked, asked), found, strict=True):
            gradient[rows] = _merged(part).to(gradient.dtype)
    return gradients


def _ranges(bounds: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(bounds.tolist())]


def _split(states: Tensor, heads: int) -> Tensor:
    """[T, H] to [A, T, H / A], in fp32 at least."""
    wide = states if states.dtype == torch.float64 else states.float()
    heads_apart: Tensor = wide.unflatten(1, (heads, states.shape[1] // heads))
    return heads_apart.transpose(0, 1)


def _merged(split: Tensor) -> Tensor:
    """The inverse of `_split`, but for the type."""
    return split.transpose(0, 1).flatten(1)


def _scores(query: Tensor, key: Tensor, heads: int, left: int, right: int) -> Tensor:
    """Scores [A, queries, tokens] of one sequence, -inf outside the window."""
    scores = _split(query, heads) @ _split(key, heads).mT / math.sqrt(query.shape[1] // heads)
    before = torch.arange(len(query))[:, None] - torch.arange(len(key))
    outside = ((before > left) & (left >= 0)) | ((-before > right) & (right >= 0))
    return scores.masked_fill(outside, -torch.inf)


def _kept(scores: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """What dropout multiplies each probability by."""
    kept = torch.rand(scores.shape, generator=generator) >= dropout
    return kept.to(scores.dtype) / (1.0 - dropout)
