"""Losses of fine-tuning tasks, summed over a micro-batch: the tasks divide by the global batch's totals.

Shapes: B examples, C classes, L labels, Q questions, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def class_loss(
    logits: Tensor, labels: Tensor, *, weights: Tensor | None = None, smoothing: float = 0.0, ordinal: bool = False
) -> Tensor:
    """Summed loss of a classifier; over the sum of the examples' weights it is torch's weighted mean.

    Args:
        logits: [B, C].
        labels: class ids [B].
        weights: of the classes [C]; None weighs all 1.
        smoothing: share of a label that is spread over all classes; not with `ordinal`.
        ordinal: `squared_distance` instead of cross-entropy (nats).
    """
    if not ordinal:
        return functional.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)
    distances = squared_distance(logits, labels)
    return (distances if weights is None else distances * weights[labels]).sum()


def squared_distance(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared earth mover's distance [B] between the classes' probabilities and the truth, classes being in order.

    The sum over classes of the squared difference of cumulated probabilities (Hou et al. 2016, "Squared Earth Mover's
    Distance-based Loss for Training Deep Neural Networks", with l = 2): a guess costs the more the further it is from
    the truth, and the most probable class stays the prediction.

    Args:
        logits: [B, C].
        labels: class ids [B].
    """
    classes = torch.arange(logits.shape[1], device=logits.device)
    # as a product, because a sum of its own for each class has a fixed order on GPUs, which cumsum has not
    up_to = classes[None, :] <= classes[:-1, None]
    cumulated = (logits.softmax(dim=1)[:, None, :] * up_to).sum(dim=2)
    truth = labels[:, None] <= classes[None, :-1]
    return (cumulated - truth.to(cumulated.dtype)).square().sum(dim=1)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed squared error of numbers [B], given as logits [B, 1]."""
    return functional.mse_loss(logits.squeeze(1), labels, reduction="sum")


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed binary cross-entropy (nats) of each label of each example; both [B, L], labels of any kind of 0 and 1."""
    return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")


def class_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric Kullback-Leibler divergence [B] (nats) of classes' probabilities, half of the sum of both directions.

    That sum is the one over classes of the difference of probabilities times that of logits: the normalisers cancel.

    Args:
        first, second: logits [B, C]; -inf in both for a class that an example doesn't have.
    """
    apart = (first - second).masked_fill(first == -torch.inf, 0.0)
    return ((first.softmax(dim=1) - second.softmax(dim=1)) * apart).sum(dim=1) / 2


def label_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Summed `class_divergence` of each label of each example, which it has or not; logits, both [B, L]."""
    return ((first.sigmoid() - second.sigmoid()) * (first - second)).sum() / 2


def choice_grid(logits: Tensor, question: Tensor, option: Tensor, questions: int, options: int) -> Tensor:
    """The logits of sequences [S, 1] as a row for each question [questions, options], -inf where it has no such option.

    Args:
        question, option: row and column of each sequence, [S].
    """
    return logits.new_full((questions, options), -torch.inf).index_put((question, option), logits.squeeze(1))
