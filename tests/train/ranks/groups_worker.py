"""One rank that trains a step at each ZeRO stage and writes how long each process group waits for a collective.

SECONDS FILE: the time-out that the ranks join with; a JSON list of lists of seconds, one a stage.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import distributed_c10d

from benchmarks.zero_exactness import Model
from engine import dist
from engine.config import OptimConfig, RunConfig, TrainConfig
from engine.data.loading.loader import BatchLayout
from engine.optim.build import build_optimizer
from engine.train.ranks.join import end_ranks, start_ranks
from engine.zero.engine import ZeroEngine
from launch.zero.build import deepspeed_config


def train(stage: int, world: dist.World) -> None:
    """Build an engine and do a step, so that each group that DeepSpeed makes at its first use exists."""
    config = RunConfig(optim=OptimConfig(), train=TrainConfig(zero_stage=stage, precision="bf16"))
    model = Model()
    values = deepspeed_config(config, BatchLayout(2, 1, world.rank, world.size), "cpu")
    zero = ZeroEngine(model, build_optimizer(model, config.optim, world.device, stage), values)
    zero.backward(zero.model(0, 0, world.rank))
    zero.step(1e-3, last_micro_batch=True)
    zero.full_state_dict()
    zero.model.destroy()


def timeouts() -> list[float]:
    """Seconds of each group of this process, the world's first."""
    groups = distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def main(seconds: float, file: Path) -> None:
    world = start_ranks(timeout=timedelta(seconds=seconds))
    found = []
    for stage in range(4):
        train(stage, world)
        found.append(timeouts())
    if world.is_main:
        file.write_text(json.dumps(found))
    end_ranks(world)


if __name__ == "__main__":
    try:
        main(float(sys.argv[1]), Path(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other ranks wait in a collective, for which an ordinary exit would wait too
