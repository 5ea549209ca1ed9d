"""LAMB's entry: algorithm 2 of You et al. 2020, with L2 norms and phi the identity.

Loads torch when an optimizer is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config import OptimConfig
from engine.config.optimizer import ExactRule, OptimizerEntry
from engine.optim.adamw import AdamRule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LambRule(AdamRule):
    """LAMB in float64: AdamW's direction, times the trust ratio of the whole parameter."""

    trusted: bool
    """whether the update is scaled by the trust ratio"""
    largest_ratio: float

    def scale(self, weight_norm: float, direction_norm: float) -> float:
        if not self.trusted or weight_norm == 0.0 or direction_norm == 0.0:
            return 1.0
        return min(weight_norm / direction_norm, self.largest_ratio)


class LambEntry(OptimizerEntry):
    """LAMB: our own optimizer at every ZeRO stage and on every device."""

    states = ("exp_avg", "exp_avg_sq")
    step_bytes = 46  # AdamW's, and weights and moments read once more in the second pass
    options = frozenset({"betas", "eps", "weight_decay", "max_trust_ratio", "nvlamb"})
    deepspeed_types = ("Lamb", "FusedLamb")
    flat_copies = 1  # of one list of tensors at a time, as the first step adjoins them

    def build(
        self, groups: list[dict[str, Any]], config: OptimConfig, device: torch.device, zero_stage: int
    ) -> torch.optim.Optimizer:
        from engine.optim.fused import FusedLamb

        terms = {"betas": config.betas, "eps": config.eps, "max_grad_norm": 0.0}
        trust = {"use_nvlamb": config.nvlamb, "max_trust_ratio": config.max_trust_ratio}
        return FusedLamb(groups, lr=0.0, **terms, **trust)  # type: ignore[arg-type]

    def exact(self, config: OptimConfig, weight_decay: float, step: int) -> ExactRule:
        trusted = weight_decay != 0.0 or config.nvlamb
        largest = math.inf if config.max_trust_ratio is None else config.max_trust_ratio
        return LambRule(config.betas, config.eps, weight_decay, step, trusted, largest)


LAMB = LambEntry()
