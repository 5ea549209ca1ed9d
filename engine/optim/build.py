"""From the configuration to an optimizer with its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config import OPTIMIZERS, OptimConfig
from engine.config.optimizer import placed_groups
from engine.kernels import dispatch

#: key of a parameter group: its learning rate as a multiple of the schedule's
RATE_MULTIPLIER = "rate_multiplier"


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The parameter groups of the configured optimizer, as torch.optim takes them; empty ones are left out.

    Each has `params`, `weight_decay` and its multiple of the schedule's learning rate (`RATE_MULTIPLIER`).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = placed_groups({name: tuple(p.shape) for name, p in trained.items()}, config)
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
    """The optimizer over whole parameters; ZeRO replaces them by its partitions afterwards; collective.

    The ranks agree on the kernels that they use (`engine.kernels.dispatch.agree`).

    The learning rate starts at 0: DeepSpeed steps some optimizers once while it initialises (stage 0 in half
    precision), and a step at rate 0 changes nothing. The loop sets the rate before every step. DeepSpeed clips.

    Args:
        model: all of its parameters that require a gradient are optimized.
        config: the optimizer's name and options.
        device: where the optimizer steps: the CPU if it is offloaded.
        zero_stage: ZeRO stage of the run, 0 to 3.
    """
    dispatch.agree(device)
    return OPTIMIZERS.get(config.name).build(parameter_groups(model, config), config, device, zero_stage)
