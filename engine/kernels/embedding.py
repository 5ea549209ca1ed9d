"""An embedding whose weight is a decoder's too: its gradient is added to the decoder's, not made beside it.

Autograd would fill a table with zeros, add the tokens' rows to it, and then add the whole table to the decoder's
gradient: several passes over the largest parameter, and memory for it twice. The backward pass reaches the decoder
first, so its gradient can wait for the rows.

Shape legend: T tokens, V vocabulary size, H width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels import dispatch


class TiedGradient:
    """Where the decoder's gradient waits for the embedding's, for one forward and backward pass."""

    def __init__(self) -> None:
        self.kernels: ModuleType | None = None
        self._gradient: Tensor | None = None

    def embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        """Rows of the weight.

        Args:
            ids: [T] int64; weight: [V, H]; padding_idx: the token whose row gets no gradient from here.

        Returns:
            [T, H].
        """
        self.kernels = dispatch.tied_embedding(weight)
        if self.kernels is None:
            return F.embedding(ids, weight, padding_idx)
        rows: Tensor = _Lookup.apply(ids, weight, padding_idx, self)
        return rows

    def decoder(self, weight: Tensor) -> Tensor:
        """The weight [V, H] for the decoder, whose gradient is to wait; called after `embedding`."""
        if self.kernels is None or not weight.requires_grad:
            return weight
        waiting: Tensor = _Waiting.apply(weight, self)
        return waiting

    def put(self, gradient: Tensor) -> None:
        """Keep the decoder's gradient, which nobody else may hold."""
        assert self._gradient is None, "one backward pass a forward pass"
        self._gradient = gradient

    def take(self, weight: Tensor) -> Tensor:
        """The decoder's gradient, or zeros if there is none."""
        gradient, self._gradient = self._gradient, None
        return torch.zeros_like(weight) if gradient is None else gradient


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding_idx, ctx.tied = padding_idx, tied
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ids, weight = ctx.saved_tensors
        table = ctx.tied.take(weight)
        ctx.tied.kernels.add_rows(table, ids, grad, ctx.padding_idx)
        return None, table, None, None


class _Waiting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tied: TiedGradient) -> Tensor:
        ctx.tied = tied
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.tied.put(grad)
        return None, None
