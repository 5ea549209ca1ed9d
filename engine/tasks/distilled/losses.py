"""Losses of a student against its teacher, of rows or of packed sequences; gradients go to the student alone.

Shapes: R rows, C classes, L labels, B sequences, T tokens in all of them, H width, A relation heads, S tokens in the
longest sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.packing import Packing


def soft_classes(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence [R] (nats) of the student's probabilities from the teacher's, times temperature².

    Both are softened by the temperature; its square keeps the gradient's size (Hinton et al. 2015, section 2).

    Args:
        student, teacher: logits [R, C]; -inf in both for a class that a row doesn't have.
    """
    told, own = ((logits / temperature).log_softmax(dim=1) for logits in (teacher, student))
    return told_apart(told, own, teacher == -torch.inf).sum(dim=1) * temperature**2


def soft_labels(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Summed `soft_classes` of each label of each example, which it has or not; logits, both [R, L]."""
    softened = [logits / temperature for logits in (teacher, student)]
    apart = torch.zeros((), device=student.device)
    for sign in (1.0, -1.0):
        told, own = (torch.nn.functional.logsigmoid(sign * logits) for logits in softened)
        apart = apart + told_apart(told, own).sum()
    return apart * temperature**2


def told_apart(told: Tensor, own: Tensor, absent: Tensor | None = None) -> Tensor:
    """The terms of a Kullback-Leibler divergence, by both logarithms of probabilities; 0 where a class is `absent`."""
    apart = told - own
    return told.exp() * (apart if absent is None else apart.masked_fill(absent, 0.0))


def unlike(student: Tensor, teacher: Tensor) -> Tensor:
    """Half of the squared distance of vectors of length 1, which is 1 - their cosine: [R], of vectors [R, H]."""
    return 1.0 - torch.nn.functional.cosine_similarity(student, teacher, dim=1)


def states_apart(student: Tensor, teacher: Tensor, lengths: Tensor) -> Tensor:
    """Summed over sequences the mean squared difference of the states of their tokens.

    Args:
        student, teacher: [T, H].
        lengths: [B].
    """
    of_tokens = (student.float() - teacher.float()).square().mean(dim=1)
    return torch.segment_reduce(of_tokens, "mean", lengths=lengths, unsafe=True).sum()


def relations_apart(student: Tensor, teacher: Tensor, heads: int, packing: Packing) -> Tensor:
    """Summed over sequences the divergence of their tokens' relations, a mean over heads and tokens.

    A token's relations are the softmax over its sequence's tokens of scaled dot products (Wang et al. 2021, "MiniLMv2",
    equations 4 to 7): of queries with queries, for example, and cut into heads of the same number in both models.

    Args:
        student, teacher: queries, keys or values of all tokens, [T, H] of widths that may differ.
    """
    told, own = (_relations(states, heads, packing) for states in (teacher, student))
    absent = None if packing.key_mask is None else ~packing.key_mask
    of_tokens = told_apart(told, own, absent).sum(dim=3).mean(dim=1)
    kept = packing.from_grid(of_tokens[..., None], packing.tokens)[:, 0]
    return torch.segment_reduce(kept, "mean", lengths=packing.sequences.lengths, unsafe=True).sum()


def _relations(states: Tensor, heads: int, packing: Packing) -> Tensor:
    """Logarithms of relations, fp32 [B, A, S, S]; -inf towards cells that hold no token."""
    grid = packing.to_grid(states.float()).unflatten(2, (heads, -1)).transpose(1, 2)
    scores = grid @ grid.transpose(2, 3) / grid.shape[3] ** 0.5
    mask = packing.key_mask
    logarithms: Tensor = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).log_softmax(dim=3)
    return logarithms
