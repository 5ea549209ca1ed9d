"""What operators take beside tensors, as every back end takes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Adam:
    """One step of Adam's moments and direction."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    """number of this step, from 1, for the bias correction"""
    bias_correction: bool = True

    def constants(self) -> tuple[float, ...]:
        """The fields of csrc/math.cuh's `AdamStep`.

        beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step); the last two are 1
        without bias correction. Formed in fp64: 1 - 0.999 in fp32 is off by 5e-5 of its value.
        """
        decayed1, decayed2 = (self.beta1**self.step, self.beta2**self.step) if self.bias_correction else (0.0, 0.0)
        corrections = (1.0 / (1.0 - decayed1), 1.0 / math.sqrt(1.0 - decayed2))
        return (self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.eps, *corrections)

    def pack(self) -> list[float]:
        """The fields as an operator's argument."""
        return [float(value) for value in astuple(self)]

    @classmethod
    def unpack(cls, values: Sequence[float]) -> Adam:
        """The inverse of `pack`."""
        lr, beta1, beta2, eps, step, bias_correction = values
        return cls(lr, beta1, beta2, eps, int(step), bool(bias_correction))


@dataclass(frozen=True)
class Trust:
    """How LAMB scales the updates."""

    clamp: float | None = None
    """largest trust ratio; None for no bound"""
    nvlamb: bool = False
    """scale parameters without weight decay by their trust ratio too (NVIDIA's `use_nvlamb`)"""

    @property
    def bound(self) -> float:
        """The largest ratio as a number."""
        return math.inf if self.clamp is None else self.clamp


@dataclass(frozen=True)
class Dropout:
    """Dropout by hashing: what an element's fate is a function of, beside its place."""

    probability: float
    seed: int

    def constants(self) -> tuple[int, int, float]:
        """The fields of csrc/dropout.cuh's `Dropout`.

        The seed, the probability in steps of 2^-32, and the scale that belongs to exactly that.
        """
        threshold = round(self.probability * 2**32)
        return self.seed, threshold, 1.0 / (1.0 - threshold * 2.0**-32)


NO_DROPOUT = Dropout(0.0, 0)


#: how many tokens before and behind its own a query sees; -1 for all
Window = tuple[int, int]
EVERYWHERE: Window = (-1, -1)


@dataclass(frozen=True)
class Sequences:
    """Packed sequences: each token that asks, a query, attends to all tokens of its own sequence.

    Made without a look at the device, where the sizes below are known beforehand.
    """

    bounds: Tensor
    """[B + 1] int64, first token of each sequence, and the end of the last"""
    query_bounds: Tensor
    """[B + 1] int64, the same among the queries; `bounds` itself where every token asks"""
    tokens: int
    """in all sequences"""
    queries: int
    longest: int
    """tokens of the longest sequence, or more"""

    @classmethod
    def of(cls, lengths: Tensor, tokens: int, longest: int) -> Sequences:
        """Every token asks; `lengths` [B] int64 are the tokens of each sequence."""
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        return cls(bounds, bounds, tokens, tokens, longest)

    def asking(self, read: Tensor) -> Sequences:
        """The same where only the tokens `read` [R] int64 ask, in ascending order."""
        return replace(self, query_bounds=torch.searchsorted(read, self.bounds), queries=len(read))

    @property
    def starts(self) -> Tensor:
        """[B] int64, first token of each sequence."""
        return self.bounds[:-1]

    @cached_property
    def lengths(self) -> Tensor:
        """[B] int64, its tokens."""
        return self.bounds.diff()

    @property
    def query_starts(self) -> Tensor:
        """[B] int64, first of its queries among all queries."""
        return self.query_bounds[:-1]

    @cached_property
    def query_lengths(self) -> Tensor:
        """[B] int64, its queries."""
        return self.lengths if self.query_bounds is self.bounds else self.query_bounds.diff()

    @cached_property
    def bounds32(self) -> Tensor:
        """`bounds` in int32."""
        return self.bounds.int()

    @cached_property
    def query_bounds32(self) -> Tensor:
        """`query_bounds` in int32."""
        return self.bounds32 if self.query_bounds is self.bounds else self.query_bounds.int()
