"""The part of the model that a rank updates: a tensor, and which ranges of which parameters lie in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from torch import Tensor


class Swap(Protocol):
    """Reads a tensor that is swapped to files between steps, with its optimizer states, and writes it back."""

    @property
    def numel(self) -> int:
        """Elements that the tensor has while it is in memory."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """Inside, the tensor and its states are in memory; changes to them are lost."""
        ...

    def replacing(self) -> AbstractContextManager[None]:
        """Inside, the tensor is in memory without states; afterwards both are written as they then are."""
        ...


@dataclass(frozen=True)
class ParameterInfo:
    """A whole parameter of the model."""

    name: str
    """as in `named_parameters`: of a tied parameter, its first name"""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Fragment:
    """tensor.view(-1)[start : start + length] is parameter.view(-1)[parameter_start : parameter_start + length]."""

    parameter: int
    """index into `Shard.parameters`"""
    start: int
    length: int
    parameter_start: int


@dataclass(frozen=True, eq=False)
class Shard:
    """One fp32 tensor that the optimizer steps, and what it consists of. Its gradient has the same layout."""

    tensor: Tensor
    """contiguous fp32: flat, or of the parameter's shape at stage 0; on the CPU if the optimizer is offloaded; without
    elements between steps if it is swapped"""
    group: int
    """index into the optimizer's `param_groups` outside of step(); inside, ZeRO 1 and 2 leave only one group there"""
    parameters: tuple[ParameterInfo, ...]
    """the parameters that the ranks of `process_group` partition in this shard, in the same order on each of them"""
    fragments: tuple[Fragment, ...]
    """this rank's fragments, ascending and disjoint, possibly none; the rest is padding, which may be uninitialised"""
    process_group: Any | None
    """the ranks that have the parameters' other fragments; None where this rank has whole parameters"""
    swap: Swap | None = None
    """reads and writes the tensor and its states, if they are in files between steps"""

    @property
    def numel(self) -> int:
        """Elements of the tensor while it is in memory."""
        return self.tensor.numel() if self.swap is None else self.swap.numel

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is one whole parameter and nothing else."""
        pieces = self.process_group is None and len(self.fragments) == 1
        return pieces and self.fragments[0].length == self.numel

    def reading(self) -> AbstractContextManager[None]:
        """Inside, the tensor and its states can be read; for one shard at a time."""
        return nullcontext() if self.swap is None else self.swap.reading()

    def replacing(self) -> AbstractContextManager[None]:
        """Inside, the tensor and all of its states are to be set anew; for one shard at a time."""
        return nullcontext() if self.swap is None else self.swap.replacing()
