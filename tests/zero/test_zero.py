"""What the engine gives out of ZeRO's partitions."""

from __future__ import annotations

from multiprocessing.pool import Pool
from typing import Any

import torch
from torch import Tensor

from benchmarks.zero_exactness import Model, weight
from engine.config import OptimConfig, RunConfig, TrainConfig
from engine.data.loading.loader import BatchLayout
from engine.optim.build import build_optimizer
from engine.zero.engine import ZeroEngine
from launch.zero.build import deepspeed_config


def full_weights(stage: int) -> dict[str, Tensor]:
    """The weights of an untrained model with a frozen embedding, in bf16."""
    config = RunConfig(optim=OptimConfig(), train=TrainConfig(zero_stage=stage, precision="bf16"))
    values: dict[str, Any] = deepspeed_config(config, BatchLayout(1, 1), "cpu")
    values["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    model = Model()
    model.get_parameter("embedding.weight").requires_grad_(False)
    zero = ZeroEngine(model, build_optimizer(model, config.optim, torch.device("cpu"), stage), values)
    full = zero.full_state_dict()
    zero.model.destroy()
    return full


def test_full_weights_hold_frozen_parameters_too(rank: Pool) -> None:
    for stage in (0, 2, 3):
        full = rank.apply(full_weights, (stage,))
        assert all(torch.equal(full[name], weight(name)) for name in full)
        assert full["embedding.weight"].shape == (101, 36)
