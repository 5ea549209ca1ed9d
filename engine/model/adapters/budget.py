"""AdaLoRA's budget (Zhang et al. 2023): how many triplets are kept at each step, and which; pure functions.

An adapter of rank r changes a matrix by B diag(E) A. Its triplet i is E[i] with row i of A and column i of B.

Shape legend: r rank, I inputs and O outputs of a layer, T triplets of all layers, n elements of one factor's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config import AdapterConfig, require
from engine.model.adapters.places import ADAPTER

#: decay of the smoothed sensitivity and of its uncertainty (beta 1 and 2 of the paper, section 4.1)
DECAY = 0.85
#: in the name of a parameter, which factor it is: A [r, I], E [r, 1], B [O, r]
FACTORS = (".lora_A.", ".lora_E.", ".lora_B.")
#: a layer's buffer of which of its triplets are kept, [r] bool
KEPT = "kept"


@dataclass(frozen=True)
class Schedule:
    """How many triplets are kept over the steps of a run, counted from 1."""

    initial: int
    """rank of an adapter at the start"""
    target: int
    """mean rank over the adapters at the end"""
    warmup: int
    """steps in which all triplets are kept"""
    last: int
    """step after which the kept triplets stay"""
    total: int
    interval: int
    """steps between changes"""

    @classmethod
    def of(cls, adapter: AdapterConfig, steps: int) -> Schedule:
        """That of a run of so many steps."""
        last = steps - int(adapter.final * steps)
        return cls(adapter.initial_rank, adapter.rank, int(adapter.warmup * steps), last, steps, adapter.interval)

    def check(self) -> None:
        """Refuse a run in which the budget would not shrink but fall at once.

        Raises:
            UserError: names adapter.interval and the steps that there are for it.
        """
        changes = (self.last - 1) // self.interval - self.warmup // self.interval
        remedy = (
            f"the budget shrinks between steps {self.warmup} (adapter.warmup) and {self.last} (adapter.final) of "
            f"{self.total}, and no multiple of it lies there; give a smaller one, or more train.steps"
        )
        require(changes > 0, "adapter.interval", self.interval, remedy)

    def budget(self, step: int, layers: int) -> int | None:
        """How many triplets of the layers are kept after a step: the cubic schedule (section 3.3); None where the
        step changes nothing."""
        if step <= self.warmup or step > self.last or (step < self.last and step % self.interval > 0):
            return None
        left = 1.0 - (step - self.warmup) / (self.last - self.warmup)
        return int((self.initial - self.target) * layers * left**3 + self.target * layers)


def observe(sensitivity: Tensor, uncertainty: Tensor, weight: Tensor, gradient: Tensor, used: Tensor | float) -> None:
    """Smooth the sensitivity |weight * gradient| of each element and its uncertainty, in place (equations 8 to 10).

    Args:
        used: 1, or 0 where the gradient is not finite and counts for nothing.
    """
    part = torch.as_tensor(used, dtype=sensitivity.dtype, device=sensitivity.device) * (1.0 - DECAY)
    now = (weight * gradient).abs().nan_to_num(0.0)
    sensitivity.lerp_(now, part)
    uncertainty.lerp_((now - sensitivity).abs(), part)


def triplets_of(name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
    """Which triplet of its layer each element of a part of a factor is of, [n] int64.

    Args:
        name: of the factor's parameter.
        shape: of the whole factor.
        start: the part's first element.
        length: its elements.
    """
    elements = torch.arange(start, start + length)
    return elements % shape[1] if ".lora_B." in name else elements // shape[1]


def spread(name: str, shape: Sequence[int]) -> int:
    """Over how many elements the score of a vector is the mean: those of a factor for one triplet (equation 11)."""
    return shape[0] if ".lora_B." in name else shape[1]


def kept(scores: Tensor, budget: int) -> Tensor:
    """The triplets of the highest scores, [T] bool; of equal ones the later."""
    found = torch.zeros(len(scores), dtype=torch.bool)
    found[scores.argsort(stable=True)[len(scores) - budget :]] = True
    return found


def mark(model: nn.Module) -> None:
    """Give each adapted layer the buffer of its kept triplets, which checkpoints hold: at first all."""
    for layer in adapted(model).values():
        layer.register_buffer(KEPT, torch.ones(len(layer.get_parameter(f"lora_E.{ADAPTER}")), dtype=torch.bool))


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_E")}


def penalty(factor: Tensor, name: str) -> Tensor:
    """How far a layer's A or B is from orthogonal, ||A A^T - I||_F or ||B^T B - I||_F (equation 4), [] fp32.

    The graph holds a copy, since ZeRO-3 may have taken the factor apart again before the backward pass.
    """
    whole = factor.to(torch.float32, copy=True)
    gram = whole @ whole.T if ".lora_A." in name else whole.T @ whole
    distance: Tensor = torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
    return distance
