"""The contrastive loss of a global batch, and its gradient by the vectors.

Of each text, its positive among the positives and negatives of the whole global batch: cross-entropy of their cosines
over a temperature (InfoNCE, van den Oord et al. 2018; multiple negatives ranking, Henderson et al. 2017). A candidate
with the tokens of the text itself, or of its positive, is no negative and left out.

The loss isn't a sum over micro-batches, but its gradient by the vectors is all that the encoder needs of the others
(GradCache, Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): every rank
computes it of all vectors, in an order that neither ranks nor accumulation change.

Shapes: S sequences of a global batch, N texts among them, C candidates (their positives, then all negatives), K texts
of a block, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.data.labelled.pairs import POSITIVE, TEXT

#: cosines that are in memory at once, and again their gradients
COSINES = 2**24


@dataclass(frozen=True)
class Places:
    """What each of S sequences of a global batch is; int64 [S] each, see `engine.data.labelled.pairs.PairSource`."""

    sequence: Tensor
    member: Tensor
    text: Tensor

    @cached_property
    def order(self) -> Tensor:
        """The sequences in the order of the source, [S]. An example that is there twice has its copies side by side."""
        return self.sequence.argsort(stable=True)

    @cached_property
    def texts(self) -> Tensor:
        """The sequences that are texts, in that order, [N]."""
        return self.order[self.member[self.order] == TEXT]

    @cached_property
    def positives(self) -> Tensor:
        """The positive of each, [N]."""
        return self.order[self.member[self.order] == POSITIVE]

    @cached_property
    def candidates(self) -> Tensor:
        """[C], the positives first."""
        return torch.cat((self.positives, self.order[self.member[self.order] > POSITIVE]))


@dataclass(frozen=True)
class Found:
    """Loss and gradient of a global batch, or of the sequences of a part of it."""

    gradient: Tensor
    """of the mean loss by the vectors, fp32 [S, H]"""
    loss: Tensor
    """share of the mean loss (nats) of each sequence that is a text, 0 of others, [S]"""
    hits: Tensor
    """as great a share of the accuracy where the positive is the nearest candidate, else 0, [S]"""

    def part(self, part: slice) -> Found:
        """That of some of the sequences."""
        return Found(self.gradient[part], self.loss[part], self.hits[part])


def contrast(vectors: Tensor, places: Places, temperature: float, *, symmetric: bool) -> Found:
    """The mean loss of all texts of a global batch, in fp32 and in blocks of `COSINES`.

    Args:
        vectors: fp32 [S, H], of any length.
        places: of the sequences.
        temperature: what cosines are divided by.
        symmetric: whether half of the loss is that of finding each positive's text among all texts.
    """
    own = vectors.detach().requires_grad_()
    count = len(places.texts)
    loss, hits = own.new_zeros(len(own)), own.new_zeros(len(own))
    with _in_fp32(), torch.enable_grad():
        unit = functional.normalize(own, dim=1)
        leaf = unit.detach().requires_grad_()
        directions = [(places.texts, places.positives, places.candidates)]
        directions += [(places.positives, places.texts, places.texts)] if symmetric else []
        for forward, (asking, right, candidates) in zip((True, False), directions, strict=False):
            rows = max(1, COSINES // len(candidates))
            for start in range(0, count, rows):
                block = slice(start, start + rows)
                of_block, nearest = _losses(leaf, places.text, (asking, right, candidates), block, temperature)
                share = of_block / (count * len(directions))
                share.sum().backward()
                loss[places.texts[block]] += share.detach()
                if forward:
                    hits[places.texts[block]] = nearest / count
        assert leaf.grad is not None
        unit.backward(leaf.grad)
    assert own.grad is not None
    return Found(own.grad, loss, hits)


def _losses(
    unit: Tensor, text: Tensor, direction: tuple[Tensor, Tensor, Tensor], block: slice, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a block of the asking sequences, and whether the right candidate is the nearest; [K] each.

    Args:
        unit: [S, H], of length 1.
        text: [S], numbers of the texts.
        direction: the sequences that ask [N], the right one of each [N], and candidates [C], the right ones first.
        block: of those that ask.
    """
    asking, right, candidates = direction
    asking, right = asking[block], right[block]
    logits = unit[asking] @ unit[candidates].T / temperature
    alike = (text[candidates] == text[asking][:, None]) | (text[candidates] == text[right][:, None])
    target = torch.arange(block.start, block.start + len(asking), device=unit.device)
    alike.scatter_(1, target[:, None], False)
    logits = logits.masked_fill(alike, -torch.inf)
    nearest = logits.detach().argmax(1) == target
    return functional.cross_entropy(logits, target, reduction="none"), nearest.to(unit.dtype)


@contextmanager
def _in_fp32() -> Iterator[None]:
    """Products of fp32 matrices without TF32, whose rounding of a cosine the temperature would multiply."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Known(torch.autograd.Function):
    """A number whose gradient by some vectors is known."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


def known(vectors: Tensor, found: Found) -> Tensor:
    """The loss share of some sequences, whose gradient by their vectors [S, H] is that of the whole global batch."""
    share: Tensor = _Known.apply(vectors, found.gradient, found.loss.sum())
    return share
