"""The numbers of an optimizer step, as every back end takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass


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
