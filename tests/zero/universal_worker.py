"""One rank that trains with LAMB and saves, or loads a universal checkpoint of DeepSpeed's and goes on.

python -m torch.distributed.run --nproc_per_node=N -m tests.zero.universal_worker save|load FOLDER STAGE
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

from benchmarks.zero_exactness import CLIP, DECAY, EPS, RATE, Model
from engine.config import OptimConfig, RunConfig, TrainConfig
from engine.data.loading.loader import BatchLayout
from engine.optim.build import build_optimizer
from engine.train.ranks.join import end_ranks, start_ranks
from engine.zero.engine import ZeroEngine
from launch.zero.build import deepspeed_config

#: shares of a global batch, whatever the number of ranks, and steps before and after the save
SHARES, BEFORE, STEPS = 2, 8, 20


def main(what: str, folder: Path, stage: int) -> None:
    world = start_ranks()
    config = RunConfig(
        optim=OptimConfig(name="lamb", weight_decay=DECAY, max_grad_norm=CLIP, eps=EPS),
        train=TrainConfig(zero_stage=stage, precision="bf16"),
    )
    layout = BatchLayout(SHARES, 1, world.rank, world.size)
    values = deepspeed_config(config, layout, "cpu") | {"checkpoint": {"load_universal": what == "load"}}
    model = Model()
    zero = ZeroEngine(model, build_optimizer(model, config.optim, world.device, stage), values)
    first, last = (0, BEFORE) if what == "save" else (BEFORE, STEPS)
    if what == "load":
        loaded, _ = zero.model.load_checkpoint(str(folder), tag="universal")
        assert loaded is not None
    for step in range(first, last):
        for micro in range(layout.accumulation):
            share = world.rank * layout.accumulation + micro
            zero.backward(zero.model(step, 0, share))
            zero.step(RATE, last_micro_batch=micro + 1 == layout.accumulation)
    if what == "save":
        zero.model.save_checkpoint(str(folder), tag="saved")
    weights = zero.full_state_dict()
    if world.is_main:
        torch.save(weights, folder / f"{what}.pt")
    end_ranks(world)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other ranks wait in a collective, for which an ordinary exit would wait too
