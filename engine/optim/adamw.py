"""AdamW's entry: algorithm 1 of Kingma & Ba 2015 with the decoupled decay of Loshchilov & Hutter 2019, algorithm 2.

Loads torch when an optimizer is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config import OptimConfig
from engine.config.optimizer import ExactRule, ExactStep, ExactSum, OptimizerEntry

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class AdamRule(ExactRule):
    """AdamW in float64: bias-corrected moments and decoupled weight decay."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    number: int
    """number of this update, from 1, for the bias correction"""

    def step(self, old: Mapping[str, Tensor]) -> ExactStep:
        (beta1, beta2), weight, gradient = self.betas, old["weight"], old["gradient"]
        kept, gained = beta1 * old["exp_avg"], (1.0 - beta1) * gradient
        exp_avg, terms = kept + gained, kept.abs() + gained.abs()
        exp_avg_sq = beta2 * old["exp_avg_sq"] + (1.0 - beta2) * gradient.square()
        denominator = (exp_avg_sq / (1.0 - beta2**self.number)).sqrt() + self.eps
        denominator = denominator * (1.0 - beta1**self.number)
        decay = self.weight_decay * weight
        states = {"exp_avg": ExactSum(exp_avg, terms), "exp_avg_sq": ExactSum(exp_avg_sq, exp_avg_sq)}
        return ExactStep(states, ExactSum(exp_avg / denominator + decay, terms / denominator + decay.abs()))

    @property
    def gradient_share(self) -> float:
        return 1.0 - self.betas[0]


class AdamWEntry(OptimizerEntry):
    """AdamW: ours, or torch's own where our kernels don't run or aren't faster."""

    states = ("exp_avg", "exp_avg_sq")
    step_bytes = 34  # fp32: weight, gradient and two moments read, all but the gradient written; a 16-bit copy written
    options = frozenset({"betas", "eps", "weight_decay"})
    deepspeed_types = ("AdamW", "Adam", "FusedAdam")
    flat_copies = 1  # of one list of tensors at a time, as the first step adjoins them

    def build(
        self, groups: list[dict[str, Any]], config: OptimConfig, device: torch.device, zero_stage: int
    ) -> torch.optim.Optimizer:
        """FusedAdamW, or torch's own where `engine.kernels.dispatch.adamw` says so."""
        import torch

        from engine.kernels import dispatch
        from engine.optim.fused import FusedAdamW

        if dispatch.adamw(device):
            return FusedAdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)

    def exact(self, config: OptimConfig, weight_decay: float, step: int) -> ExactRule:
        return AdamRule(config.betas, config.eps, weight_decay, step)


ADAMW = AdamWEntry()
