"""One rank that trains with and without offload, saves under offload, and goes on from that in either way.

python -m torch.distributed.run --nproc_per_node=N -m tests.zero.offload_worker FILE CASE ...
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from benchmarks.zero_exactness import CLIP, DECAY, EPS, RATE, Model
from engine import dist
from engine.config import OptimConfig, Precision, RunConfig, TrainConfig, ZeroConfig
from engine.data.loading.loader import BatchLayout
from engine.optim.build import build_optimizer
from engine.train.ranks.join import end_ranks, start_ranks
from engine.zero import states
from engine.zero.engine import ZeroEngine
from launch.zero.build import deepspeed_config

#: shares of a global batch, and steps before and after the checkpoint
SHARES, BEFORE, AFTER = 4, 5, 2
PLAIN = ZeroConfig()
OPTIMIZER = ZeroConfig(offload_optimizer="cpu")
PARAMETERS = ZeroConfig(offload_parameters="cpu")
BOTH = ZeroConfig(offload_optimizer="cpu", offload_parameters="cpu")
#: name -> (ZeRO stage, optimizer, precision, what is offloaded)
CASES: dict[str, tuple[int, str, Precision, ZeroConfig]] = {
    "1": (1, "adamw", "fp32", OPTIMIZER),
    "2": (2, "adamw", "fp32", OPTIMIZER),
    "3": (3, "adamw", "fp32", OPTIMIZER),
    "3-parameters": (3, "adamw", "fp32", PARAMETERS),
    "3-both": (3, "adamw", "fp32", BOTH),
    "1-lamb": (1, "lamb", "fp32", OPTIMIZER),
    "2-bf16": (2, "adamw", "bf16", OPTIMIZER),
    "3-lamb-bf16": (3, "lamb", "bf16", BOTH),
}
#: the cases of the fast suite
FEW = ("1-lamb", "2-bf16", "3-both")


def engine(case: tuple[int, str, Precision, ZeroConfig], world: dist.World) -> tuple[ZeroEngine, BatchLayout]:
    """A new engine; at stage 3 no parameter stays whole."""
    stage, name, precision, zero = case
    config = RunConfig(
        optim=OptimConfig(name=name, weight_decay=DECAY, max_grad_norm=CLIP, eps=EPS),  # type: ignore[arg-type]
        train=TrainConfig(zero_stage=stage, precision=precision),
        zero=zero,
    )
    layout = BatchLayout(SHARES, 1, world.rank, world.size)
    values = deepspeed_config(config, layout, "cpu")
    values["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    model = Model()
    return ZeroEngine(model, build_optimizer(model, config.optim, torch.device("cpu"), stage), values), layout


def train(zero: ZeroEngine, layout: BatchLayout, steps: range) -> list[float]:
    """The loss of each step over the global batch."""
    losses = []
    for step in steps:
        total = torch.zeros(())
        for micro in range(layout.accumulation):
            loss = zero.model(step, 0, layout.rank * layout.accumulation + micro)
            total += loss.detach().float()
            zero.backward(loss)
            zero.step(RATE, last_micro_batch=micro + 1 == layout.accumulation)
        losses.append(float(dist.sum_over_ranks(total)))
    return losses


def follow(name: str, folder: Path, world: dist.World) -> dict[str, list[float]]:
    """The losses of a case without offload, with it, and resumed from its checkpoint in both ways."""
    stage, optimizer, precision, _ = CASES[name]
    plain = (stage, optimizer, precision, PLAIN)
    found: dict[str, list[float]] = {}
    first, last = range(BEFORE), range(BEFORE, BEFORE + AFTER)
    zero, layout = engine(plain, world)
    found["plain"] = train(zero, layout, first) + train(zero, layout, last)
    zero.model.destroy()
    zero, layout = engine(CASES[name], world)
    found["offloaded"] = train(zero, layout, first)
    folder.mkdir(exist_ok=True)
    states.snapshot(zero.wrapper, copy=False).write(folder)
    dist.barrier()
    found["offloaded"] += train(zero, layout, last)
    zero.model.destroy()
    for way, case in {"resumed": CASES[name], "resumed without": plain}.items():
        zero, layout = engine(case, world)
        zero.load_states(folder)
        found[way] = train(zero, layout, last)
        zero.model.destroy()
    return found


def main(file: Path, *names: str) -> None:
    world = start_ranks()
    found = {name: follow(name, file.parent / name, world) for name in names}
    if world.is_main:
        file.write_text(json.dumps(found))
    end_ranks(world)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other ranks wait in a collective, for which an ordinary exit would wait too
