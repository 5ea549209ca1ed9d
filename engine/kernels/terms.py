"""What operators take beside tensors, as every back end takes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Sequences:
    """Which tokens attend to which."""

    starts: Tensor
    """[B] int64, first token of each sequence"""
    lengths: Tensor
    """[B] int64, its tokens"""
    query_starts: Tensor
    """[B] int64, first of its tokens that are queries, among all queries"""
    query_lengths: Tensor
    """[B] int64, how many of its tokens are queries"""

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, read: Tensor | None = None) -> Sequences:
        """Each sequence to itself; only of the tokens `read` [R], in ascending order, where that is given."""
        if read is None:
            return cls(starts, lengths, starts, lengths)
        bounds = torch.cat((torch.searchsorted(read, starts), torch.tensor([len(read)])))
        return cls(starts, lengths, bounds[:-1], bounds.diff())
