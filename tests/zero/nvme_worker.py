"""One rank that trains in memory, on the CPU and on NVMe, with sizes whose pieces lie at odd addresses.

python -m torch.distributed.run --nproc_per_node=N -m tests.zero.nvme_worker FILE
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import zero_exactness
from engine import dist
from engine.config import Precision, ZeroConfig
from engine.data.loading.loader import BatchLayout
from engine.train.ranks.join import end_ranks, start_ranks
from engine.zero import states
from engine.zero.engine import ZeroEngine
from tests.zero import offload_worker
from tests.zero.offload_worker import AFTER, BEFORE, engine, train

#: a sub-group for each matrix of 1 MiB or more a rank; a head that follows it, and vectors that stay in memory
zero_exactness.SHAPES |= {"embedding.weight": (3001, 257), "intermediate.weight": (1031, 513)}
SUB_GROUP = 600_000
CASES: dict[str, tuple[str, Precision]] = {
    f"{name}-{precision}": (name, precision) for name in ("adamw", "lamb") for precision in ("fp32", "bf16")
}


class PartlyUsed(offload_worker.Model):
    """The model, of which the intermediate layer takes part in every other step only."""

    def forward(self, step: int, micro: int, rank: int) -> Tensor:
        blocks = [block for block in zero_exactness.BLOCKS if step % 2 == 0 or block != "intermediate"]
        return torch.stack([self.get_submodule(block)(step, micro, rank) for block in blocks]).sum()


def start(name: str, place: str, world: dist.World, folder: Path, stage: int = 3) -> tuple[ZeroEngine, BatchLayout]:
    """A new engine with its optimizer in a place: none, cpu or nvme."""
    path = str(folder / "swap") if place == "nvme" else None
    return engine((stage, *CASES[name], ZeroConfig(offload_optimizer=place, nvme_path=path)), world)  # type: ignore[arg-type]


def follow(name: str, folder: Path, world: dist.World) -> dict[str, object]:
    """Losses by place, and resumed from each of two checkpoints in each of two places; how far exports are apart."""
    losses: dict[str, list[float]] = {}
    exports = {}
    first, last = range(BEFORE), range(BEFORE, BEFORE + AFTER)
    for place in ("none", "cpu", "nvme"):
        zero, layout = start(name, place, world, folder)
        losses[place] = train(zero, layout, first)
        if place != "cpu":
            (folder / place).mkdir(parents=True, exist_ok=True)
            states.snapshot(zero.wrapper, copy=False).write(folder / place)
        dist.barrier()
        losses[place] += train(zero, layout, last)
        exports[place] = zero.full_state_dict()
        swapped = sum(map(zero.model.optimizer._swappable_optimizer_subgroup, range(3)))
        zero.model.destroy()
    for source, place in (("nvme", "nvme"), ("nvme", "none"), ("none", "nvme")):
        zero, layout = start(name, place, world, folder)
        zero.load_states(folder / source)
        losses[f"{source} to {place}"] = train(zero, layout, last)
        zero.model.destroy()
    apart = max((float((exports["cpu"][key] - one).abs().max()) for key, one in exports["nvme"].items()), default=0.0)
    return {"losses": losses, "apart": apart, "exported": len(exports["nvme"]), "swapped": swapped}


def partly_used(folder: Path, world: dist.World) -> dict[str, list[float]]:
    """Losses of a model that doesn't use all of its parameters in every step, at stage 1 and by place at stage 3."""
    offload_worker.Model = PartlyUsed  # type: ignore[misc]
    losses = {}
    for stage, place in ((1, "none"), (3, "cpu"), (3, "nvme")):
        zero, layout = start("adamw-fp32", place, world, folder, stage)
        losses[place] = train(zero, layout, range(BEFORE))
        zero.model.destroy()
    return losses


def main(file: Path) -> None:
    world = start_ranks()
    original = offload_worker.deepspeed_config

    def with_sub_groups(*arguments: object) -> dict[str, object]:
        values = original(*arguments)  # type: ignore[arg-type]
        values["zero_optimization"] |= {"sub_group_size": SUB_GROUP}  # type: ignore[operator]
        return values

    offload_worker.deepspeed_config = with_sub_groups
    found: dict[str, object] = {name: follow(name, file.parent / name, world) for name in CASES}
    found["partly used"] = partly_used(file.parent / "partly", world)
    if world.is_main:
        file.write_text(json.dumps(found))
    end_ranks(world)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other ranks wait in a collective, for which an ordinary exit would wait too
