"""From the configuration to an optimizer with its parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from engine.config import OptimConfig
from engine.kernels import fused
from engine.optim.fused import FusedAdamW, FusedLamb


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings with weight decay; biases and LayerNorm (one dimension) without."""
    trainable = [(name, p) for name, p in named if p.requires_grad]
    decayed = [p for _, p in trainable if p.ndim >= 2]
    others = [p for _, p in trainable if p.ndim < 2]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimConfig, device: torch.device, zero_stage: int = 0
) -> torch.optim.Optimizer:
    """The optimizer over whole parameters; ZeRO replaces them by its partitions afterwards.

    AdamW is torch's own where our kernels don't run on `device`, the device that the run trains on, and on GPUs at
    stage 0: there ours would gather some 200 separate parameters into flat tensors at every step.

    The learning rate starts at 0: DeepSpeed steps some optimizers once while it initialises (stage 0 in half
    precision), and a step at rate 0 changes nothing. The loop sets the rate before every step. DeepSpeed clips.
    """
    groups = parameter_groups(model.named_parameters(), config.weight_decay)
    if config.name == "lamb":
        terms = {"betas": config.betas, "eps": config.eps, "max_grad_norm": 0.0}
        trust = {"use_nvlamb": config.nvlamb, "max_trust_ratio": config.max_trust_ratio}
        return FusedLamb(groups, lr=0.0, **terms, **trust)  # type: ignore[arg-type]
    if fused(device) and (device.type == "cpu" or zero_stage > 0):
        return FusedAdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
