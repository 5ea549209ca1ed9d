"""From the configuration to an optimizer with its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config import OPTIMIZERS, OptimConfig

#: the key of a parameter group under which its learning rate is told over that of the schedule
RATE_MULTIPLIER = "rate_multiplier"


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The groups of the configured optimizer as torch takes them; empty ones are left out."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = OPTIMIZERS.get(config.name).groups({name: tuple(p.shape) for name, p in trained.items()}, config)
    placed = sorted(name for group in groups for name in group.names)
    assert placed == sorted(trained), f"{config.name}: not each trained parameter is in one group"
    return [
        {
            "params": [trained[name] for name in group.names],
            "weight_decay": group.weight_decay,
            RATE_MULTIPLIER: group.rate_multiplier,
        }
        for group in groups
        if group.names
    ]


def build_optimizer(
    model: nn.Module, config: OptimConfig, device: torch.device, zero_stage: int = 0
) -> torch.optim.Optimizer:
    """The optimizer over whole parameters; ZeRO replaces them by its partitions afterwards.

    The learning rate starts at 0: DeepSpeed steps some optimizers once while it initialises (stage 0 in half
    precision), and a step at rate 0 changes nothing. The loop sets the rate before every step. DeepSpeed clips.

    Args:
        device: where the optimizer steps.
    """
    return OPTIMIZERS.get(config.name).build(parameter_groups(model, config), config, device, zero_stage)
