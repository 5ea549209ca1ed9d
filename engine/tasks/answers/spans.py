"""Spans of tokens by the logits of their first and last token, in packed windows without padding.

Shapes: B windows, T tokens in all of them, C of these that may be in an answer, K candidates of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """The best spans of each window, falling; where there are fewer than K, the rest has -inf for logits."""

    first: Tensor
    """first token of each span in its window, int64 [B, K]"""
    last: Tensor
    """last token, int64 [B, K]"""
    first_logits: Tensor
    """fp32 [B, K]"""
    last_logits: Tensor
    """fp32 [B, K]"""


def log_normaliser(logits: Tensor, lengths: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over the tokens of each window, for each column.

    Args:
        logits: fp32 [T, 2].
        lengths: int64 [B], each at least 1; they sum to T.

    Returns:
        [B, 2].
    """
    window = _window_of(lengths, len(logits))
    highest = torch.segment_reduce(logits.detach(), "max", lengths=lengths, unsafe=True)
    total = torch.segment_reduce((logits - highest[window]).exp(), "sum", lengths=lengths, unsafe=True)
    return highest + total.log()


def span_losses(logits: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (nats) of each window: mean of that of the first token and that of the last one.

    As transformers' models compute it of windows without padding (Devlin et al. 2019, section 4.2).

    Args:
        logits, lengths: see `log_normaliser`.
        labels: int64 [B, 2], first and last token of the answer in each window.

    Returns:
        [B].
    """
    starts = lengths.cumsum(0) - lengths
    chosen = logits.gather(0, starts[:, None] + labels)
    return (log_normaliser(logits, lengths) - chosen).mean(1)


def span_divergence(first: Tensor, second: Tensor, lengths: Tensor) -> Tensor:
    """Symmetric Kullback-Leibler divergence (nats) of each window: mean of that of first tokens and that of last ones.

    As `engine.tasks.losses.class_divergence`, the tokens of the window being the classes.

    Args:
        first, second: logits, fp32 [T, 2].
        lengths: see `log_normaliser`.

    Returns:
        [B].
    """
    window = _window_of(lengths, len(first))
    shares = [(logits - log_normaliser(logits, lengths)[window]).exp() for logits in (first, second)]
    terms = (shares[0] - shares[1]) * (first - second)
    return torch.segment_reduce(terms, "sum", lengths=lengths, unsafe=True).mean(1) / 2


def spans_apart(student: Tensor, teacher: Tensor, lengths: Tensor) -> Tensor:
    """Kullback-Leibler divergence (nats) of each window: how far the student is from the teacher, not the other way.

    Args and returns: see `span_divergence`.
    """
    window = _window_of(lengths, len(student))
    told, own = (logits - log_normaliser(logits, lengths)[window] for logits in (teacher, student))
    return torch.segment_reduce(told.exp() * (told - own), "sum", lengths=lengths, unsafe=True).mean(1)


def best_spans(logits: Tensor, lengths: Tensor, context: Tensor, count: int, longest: int) -> Spans:
    """The spans of the highest sums of two logits, among the `count` best first and the `count` best last tokens.

    Args:
        logits, lengths: see `log_normaliser`.
        context: int64 [B, 2], where the tokens that an answer may have start and stop in each window.
        count: K, spans that are wanted.
        longest: tokens of a span, at most.
    """
    first, last = (_highest(logits[:, column], lengths, context, count) for column in (0, 1))
    starts = (lengths.cumsum(0) - lengths)[:, None]
    values = [logits[:, column][places.clamp(min=0) + starts] for column, places in enumerate((first, last))]
    tokens = last[:, None, :] - first[:, :, None] + 1
    allowed = (tokens >= 1) & (tokens <= longest) & (first >= 0)[:, :, None] & (last >= 0)[:, None, :]
    sums = (values[0][:, :, None] + values[1][:, None, :]).masked_fill(~allowed, -torch.inf).flatten(1)
    # a stable order: of equal sums the same span wins on every device
    best = sums.sort(dim=1, descending=True, stable=True).indices[:, :count]
    missing = sums.gather(1, best) == -torch.inf
    chosen = (best // count, best % count)
    found = [
        value.gather(1, index).masked_fill(missing, -torch.inf) for value, index in zip(values, chosen, strict=True)
    ]
    return Spans(first.gather(1, chosen[0]), last.gather(1, chosen[1]), *found)


def _highest(values: Tensor, lengths: Tensor, context: Tensor, count: int) -> Tensor:
    """Places in their windows of the `count` highest of [T] among the context's, int64 [B, count]; -1 for none."""
    sizes = context[:, 1] - context[:, 0]
    total = int(sizes.sum())
    window, before = _window_of(sizes, total), sizes.cumsum(0) - sizes
    places = torch.arange(total, device=values.device) - before[window] + context[window, 0]
    candidates = values[places + (lengths.cumsum(0) - lengths)[window]]
    order = candidates.sort(descending=True, stable=True).indices
    order = order[window[order].sort(stable=True).indices]
    rank = torch.arange(total, device=values.device) - before[window]
    kept = rank < count
    found = places.new_full((len(lengths), count), -1)
    found[window[kept], rank[kept]] = places[order][kept]
    return found


def _window_of(sizes: Tensor, total: int) -> Tensor:
    """The window of each of `total` tokens, int64, by the tokens of each window."""
    windows = torch.arange(len(sizes), device=sizes.device)
    return torch.repeat_interleave(windows, sizes, output_size=total)
