"""A flat tensor of ZeRO for the optimizer kernels: its fragments as segments, and norms of whole parameters over ranks.

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
    """Which fragments of which parameters a flat tensor consists of.

    Attributes:
        owner: [F] int64, index of the parameter that each fragment belongs to.
        names: [P], names of the parameters.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.names = [info.name for info in shard.parameters]
        device = shard.tensor.device
        self.owner = torch.tensor([piece.parameter for piece in shard.fragments], dtype=torch.int64, device=device)
        self._segments: dict[float, Segments] = {}

    def segments(self, weight_decay: float) -> Segments:
        """One segment per fragment; between them lies padding, which no kernel touches."""
        if weight_decay not in self._segments:
            starts = [piece.start for piece in self.shard.fragments]
            lengths = [piece.length for piece in self.shard.fragments]
            device = self.shard.tensor.device
            self._segments[weight_decay] = Segments.build(starts, lengths, [weight_decay] * len(starts), device=device)
        return self._segments[weight_decay]

    def whole_squares(self, squares: Tensor) -> Tensor:
        """From sums of squares over this rank's fragments, [F, 2] fp64, to those over whole parameters, [P, 2].

        One all-reduce over the ranks that hold the parameters' fragments, of 16 bytes per parameter.
        """
        own = squares.new_zeros(len(self.names), squares.shape[1]).index_add_(0, self.owner, squares)
        group = self.shard.process_group
        return own if group is None else dist.sum_over_ranks(own, group)
