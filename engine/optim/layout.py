"""A flat tensor of ZeRO as the optimizer kernels take it: its pieces as segments, their parameters' norms over ranks.

Shape legend: F fragments of this rank, P parameters of the shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import dist
from engine.kernels.segments import Segments
from engine.optim.shard import Shard


@dataclass(frozen=True)
class ParameterNorms:
    """One parameter at one step."""

    weight: float
    """L2 norm of the weights before the step"""
    update: float
    """L2 norm of the change"""
    ratio: float
    """trust ratio; 1 where none is used"""


@dataclass(frozen=True)
class Norms:
    """Scalar tensors of one parameter at one step."""

    weight: Tensor
    """L2 norm of the weights before the step"""
    update: Tensor
    """L2 norm of the change, in units of the schedule's learning rate"""
    ratio: Tensor
    """trust ratio; 1 where none is used"""


class FlatLayout:
    """What a flat tensor consists of.

    Attributes:
        owner: [F] int64, the parameter of each fragment.
        names: [P], the parameters.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.names = [info.name for info in shard.parameters]
        device = shard.tensor.device
        self.owner = torch.tensor([piece.parameter for piece in shard.fragments], dtype=torch.int64, device=device)
        self._segments: dict[float, Segments] = {}

    def segments(self, weight_decay: float) -> Segments:
        """A segment a fragment; what lies between them is padding, which no kernel touches."""
        if weight_decay not in self._segments:
            starts = [piece.start for piece in self.shard.fragments]
            lengths = [piece.length for piece in self.shard.fragments]
            device = self.shard.tensor.device
            self._segments[weight_decay] = Segments.build(starts, lengths, [weight_decay] * len(starts), device=device)
        return self._segments[weight_decay]

    def whole_squares(self, squares: Tensor) -> Tensor:
        """From sums of squares of this rank's fragments, [F, 2] fp64, to those of whole parameters, [P, 2].

        One collective over the ranks that share the parameters out, of 16 bytes a parameter.
        """
        own = squares.new_zeros(len(self.names), squares.shape[1]).index_add_(0, self.owner, squares)
        group = self.shard.process_group
        return own if group is None else dist.sum_over_ranks(own, group)
