"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config.optimizer import OPTIMIZERS, part_decays
from engine.errors import require

ScheduleName = Literal["linear", "polynomial", "cosine", "wsd", "constant", "range_test"]


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = "adamw"
    """optimizer: adamw (Loshchilov & Hutter 2019) or lamb (You et al. 2020), exact at every ZeRO stage"""
    learning_rate: float = 1e-4
    """peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of the first and second moments"""
    eps: float = 1e-6
    """added to the denominator of the update"""
    weight_decay: float = 0.01
    """decoupled decay of weight matrices and embeddings; never of biases and LayerNorm"""
    decay_of: str | None = None
    """weight_decay of single parts, separated by commas, such as embeddings=0,layers:0-5=0.05,head=0.1: parts as in
    train.freeze, and head for all outside of the encoder; of rules that hold the same weight the last counts"""
    max_grad_norm: float = 1.0
    """clip the global gradient norm to this; 0 turns clipping off"""
    max_trust_ratio: float | None = None
    """lamb only: largest trust ratio; null for no bound"""
    nvlamb: bool = False
    """lamb only: scale biases and LayerNorm by their trust ratios too, which are 1 by default"""
    layer_decay: float = 1.0
    """learning rate of each encoder layer over that of the one above it (Howard and Ruder 2018); the head has the full
    rate, the embeddings the lowest"""
    lora_ratio: float = 1.0
    """learning rate of LoRA's B over that of its A (LoRA+, Hayou et al. 2024); of adapter.method lora and dora"""
    schedule: ScheduleName = "linear"
    """learning rate after warm-up: linear, polynomial, cosine, wsd (warmup-stable-decay) or constant; or range_test,
    which grows geometrically from min_ratio times the peak up to it (Smith 2017, see zerobert search --lr-finder)"""
    warmup: float = 0.1
    """warm-up: a share of the steps when below 1, else a number of steps"""
    decay: float = 0.1
    """wsd only: the decay phase, as a share of the steps when below 1, else a number of steps"""
    power: float = 2.0
    """polynomial only: exponent of the decay"""
    min_ratio: float = 0.0
    """final learning rate as a share of the peak; of range_test the first one"""

    def validate(self) -> None:
        OPTIMIZERS.check(self.name)
        require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "give a positive number")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "give two numbers in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "give a positive number")
        for name in ("weight_decay", "max_grad_norm", "warmup", "decay"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "give 0 or more")
        decay = self.layer_decay
        require(0 < decay <= 1, "optim.layer_decay", decay, "give a share in (0, 1]")
        require(self.lora_ratio > 0, "optim.lora_ratio", self.lora_ratio, "give a positive number")
        require(self.power > 0, "optim.power", self.power, "give a positive number")
        part_decays(self.decay_of)
        clamp = self.max_trust_ratio
        require(clamp is None or clamp > 0, "optim.max_trust_ratio", clamp, "give a positive number, or null")
        require(0 <= self.min_ratio <= 1, "optim.min_ratio", self.min_ratio, "give a share in [0, 1]")
        grows = self.schedule == "range_test"
        remedy = "optim.schedule range_test grows from that share of the peak; give one above 0"
        require(self.min_ratio > 0 or not grows, "optim.min_ratio", self.min_ratio, remedy)
