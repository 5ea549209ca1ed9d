"""From the configuration to an optimizer with its parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from engine.config import OptimConfig


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


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over whole parameters; ZeRO replaces them by its partitions afterwards.

    The learning rate starts at 0: DeepSpeed steps some optimizers once while it initialises (stage 0 in half
    precision), and a step at rate 0 changes nothing. The loop sets the rate before every step.
    """
    groups = parameter_groups(model.named_parameters(), config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
