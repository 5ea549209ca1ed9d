"""Rotary position embeddings (Su et al. 2021, RoFormer) of packed tokens.

Shape legend: T tokens, A heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The angles of each token. Not a container of tensors on purpose, see `engine.model.packing.Packing`."""

    cos: Tensor
    """[T, D / 2] fp32"""
    sin: Tensor
    """[T, D / 2] fp32"""

    @classmethod
    def of(cls, positions: Tensor, width: int, theta: float) -> Rotation:
        """The rotation of tokens at `positions` [T] by angles position * theta^(-2i / D)."""
        steps = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
        angles = positions[:, None].float() * (1.0 / theta ** (steps / width))
        return cls(angles.cos(), angles.sin())

    def turn(self, states: Tensor) -> Tensor:
        """[T or more, A, D] to the same, computed in fp32: element i turns with element i + D / 2.

        Rows behind the last token stay as they are.
        """
        tokens = len(self.cos)
        first, second = states[:tokens].float().chunk(2, -1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(states.dtype)
        return turned if len(states) == tokens else torch.cat((turned, states[tokens:]))
