"""What the engine gives out of ZeRO's partitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.zero_exactness import Model, weight
from engine.config import OptimConfig, RunConfig, TrainConfig
from engine.data.loader import BatchLayout
from engine.optim.build import build_optimizer
from engine.train.zero import ZeroEngine, start_ranks
from launch.launcher import single_process_variables
from launch.zero_config import deepspeed_config
from tests.train.runs import free_port


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_full_weights_hold_frozen_parameters_too(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in single_process_variables(free_port()).items():
        monkeypatch.setenv(name, value)
    world = start_ranks()
    config = RunConfig(optim=OptimConfig(), train=TrainConfig(zero_stage=stage, precision="bf16"))
    values: dict[str, Any] = deepspeed_config(config, BatchLayout(1, 1), "cpu")
    values["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    model = Model()
    model.get_parameter("embedding.weight").requires_grad_(False)
    zero = ZeroEngine(model, build_optimizer(model, config.optim, world.device, stage), values)
    full = zero.full_state_dict()
    zero.model.destroy()
    assert all(torch.equal(full[name], weight(name)) for name in full)
    assert full["embedding.weight"].shape == (101, 36)
