"""Which ranges of a flat buffer are parameters, and the chunks that the optimizer kernels work through.

Shape legend: S segments, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor

from engine.kernels.terms import Trust

#: most elements of a chunk: 512 KiB of weights, gradients and moments, which a core's second-level cache holds
CHUNK = 32768

#: a flat buffer that the segments cut, or a contiguous tensor for each segment
Buffer: TypeAlias = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Segments:
    """Ranges of flat buffers, one a parameter (or a parameter's fragment), and their chunks.

    Elements outside the ranges are padding that no kernel reads or writes. Built once by `Segments.build`.
    """

    offset: Tensor
    """[S] int64, first element"""
    length: Tensor
    """[S] int64, elements"""
    weight_decay: Tensor
    """[S] fp32, decoupled decay"""
    trust: Tensor
    """[S] bool, whether LAMB scales the segment by its trust ratio (else by 1)"""
    begin: Tensor
    """[C] int64, first element of each chunk"""
    size: Tensor
    """[C] int32, elements of each chunk"""
    owner: Tensor
    """[C] int32, the segment of each chunk"""
    first: Tensor
    """[S + 1] int32, first chunk of each segment, then the number of chunks"""

    @classmethod
    def build(
        cls,
        offset: Sequence[int],
        length: Sequence[int],
        weight_decay: Sequence[float],
        trust: Sequence[bool] | None = None,
        device: torch.device | str = "cpu",
    ) -> Segments:
        """The table of `offset[i] .. offset[i] + length[i]`, on `device`; `trust` is true throughout by default."""
        assert len(offset) == len(length) == len(weight_decay)
        starts = torch.tensor(offset, dtype=torch.int64)
        lengths = torch.tensor(length, dtype=torch.int64)
        counts = (lengths + CHUNK - 1) // CHUNK
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        done = (torch.arange(len(owner)) - first[owner]) * CHUNK
        table = cls(
            offset=starts,
            length=lengths,
            weight_decay=torch.tensor(weight_decay, dtype=torch.float32),
            trust=torch.tensor([True] * len(lengths) if trust is None else list(trust), dtype=torch.bool),
            begin=starts[owner] + done,
            size=(lengths[owner] - done).clamp(max=CHUNK).int(),
            owner=owner.int(),
            first=first.int(),
        )
        return table.to(device)

    @classmethod
    def whole(cls, elements: int, weight_decay: float = 0.0, device: torch.device | str = "cpu") -> Segments:
        """One segment that covers a buffer of `elements`."""
        return cls.build([0], [elements], [weight_decay], device=device)

    def scaled(self, trust: Trust) -> Tensor:
        """[S] bool, whether LAMB scales the segment by its trust ratio."""
        return self.trust if trust.nvlamb else self.trust & (self.weight_decay != 0.0)

    def to(self, device: torch.device | str) -> Segments:
        """The table on another device."""
        return Segments.from_tensors([tensor.to(device) for tensor in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """The table's tensors in the order of its fields, as an operator's argument."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> Segments:
        """The inverse of `tensors`."""
        return cls(*tensors)

    def ranges(self) -> list[slice]:
        """The segments as slices of the flat buffers."""
        return [
            slice(start, start + size) for start, size in zip(self.offset.tolist(), self.length.tolist(), strict=True)
        ]
