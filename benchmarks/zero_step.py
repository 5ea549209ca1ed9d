"""The optimizer step under ZeRO on 2 ranks: ours against torch's fused AdamW and DeepSpeed's CPUAdam as clients.

    python -m benchmarks.zero_step                     ZeRO-1 and ZeRO-2, 24M parameters, bf16

Timed is the engine's step() after a backward pass: norm, unscaling and clipping, the optimizer, the bf16 copy and the
all-gather of the weights. Of these the optimizer differs, and the clipping, which ours do in the step. All rivals live
in the same two processes and take turns. Collectives are counted in one step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Timing, emit, run_ranks
from benchmarks.optimizer_step import SIZES, shapes

RIVALS = ("FusedAdamW", "FusedLamb", "torch.optim.AdamW(fused)", "DeepSpeedCPUAdam")


class Model(nn.Module):
    """Parameters of an encoder; the loss is their mean, so a pass costs little."""

    def __init__(self, size: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes(*SIZES[size])]
        self.weights = nn.ParameterList(nn.Parameter(tensor) for tensor in drawn)

    def forward(self) -> Tensor:
        return torch.stack([w.float().mean() for w in self.weights]).sum()


def build(rival: str, model: nn.Module) -> torch.optim.Optimizer:
    """The client optimizer."""
    from engine.config import OptimConfig
    from engine.optim import FusedAdamW, FusedLamb
    from engine.optim.build import parameter_groups

    groups: Any = parameter_groups(model, OptimConfig(weight_decay=0.01))
    if rival == "FusedAdamW":
        return FusedAdamW(groups, lr=1e-4)
    if rival == "FusedLamb":
        return FusedLamb(groups, lr=1e-4, max_grad_norm=0.0)
    if rival == "torch.optim.AdamW(fused)":
        return torch.optim.AdamW(groups, lr=1e-4, fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=1e-4, adamw_mode=True)
    return optimizer


def engine(rival: str, size: str, stage: int) -> Any:
    """A ZeRO engine over the configuration that the launcher makes, with clipping on."""
    from engine.config import RunConfig, TrainConfig
    from engine.data.loading.loader import BatchLayout
    from engine.zero.engine import ZeroEngine
    from launch.zero.build import deepspeed_config

    config = RunConfig(train=TrainConfig(zero_stage=stage, precision="bf16"))
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    model = Model(size)
    dictionary = deepspeed_config(config, BatchLayout(ranks, 1, rank, ranks), "cpu")
    return ZeroEngine(model, build(rival, model), dictionary)


def count_collectives(step: Callable[[], object]) -> int:
    """Collectives of one call, barriers left out, as torch's profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(row.count for row in profile.key_averages() if row.key.startswith("c10d::") and "barrier" not in row.key)


def worker(output: Path, size: str, stage: int, repeats: int, names: list[str]) -> None:
    """One rank: rivals in turn; rank 0 writes milliseconds and collectives of each."""
    from engine.train.ranks.join import end_ranks, start_ranks

    world = start_ranks()
    engines = {rival: engine(rival, size, stage) for rival in names}
    times: dict[str, list[float]] = {rival: [] for rival in names}
    collectives = {}
    for number in range(repeats + 2):
        for rival, zero in engines.items():
            zero.backward(zero.model())
            torch.distributed.barrier()
            if number == 1:
                collectives[rival] = count_collectives(lambda zero=zero: zero.step(1e-4, last_micro_batch=True))
                continue
            start = time.perf_counter()
            zero.step(1e-4, last_micro_batch=True)
            torch.distributed.barrier()
            if number > 1:
                times[rival].append((time.perf_counter() - start) * 1e3)
    if world.is_main:
        output.write_text(json.dumps({"times": times, "collectives": collectives}))
    end_ranks(world)


def measure(size: str, stage: int, repeats: int, names: list[str]) -> dict[str, Any]:
    """Start two ranks and return a table."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        chosen = ["--worker", str(output), "--sizes", size, "--stages", str(stage), "--repeats", str(repeats)]
        run_ranks("benchmarks.zero_step", 2, [*chosen, "--rivals", *names])
        found = json.loads(output.read_text())
    peer = "torch.optim.AdamW(fused)"
    rivals = {}
    for rival, runs in found["times"].items():
        timing = Timing(runs)
        ratios = sorted(own / other for own, other in zip(runs, found["times"].get(peer, runs), strict=True))
        rivals[rival] = {
            **timing.to_dict(),
            "x torch": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "collectives": found["collectives"][rival],
        }
    return {"title": f"ZeRO-{stage}, {size} parameters, bf16, 2 ranks of 1 thread", "rivals": rivals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="steps of each rival, at least 5 (default 9)")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["24M"], help="model sizes")
    parser.add_argument("--stages", type=int, nargs="+", choices=[1, 2, 3], default=[1, 2], help="ZeRO stages")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="optimizers")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.sizes[0], args.stages[0], args.repeats, args.rivals)
    if "DeepSpeedCPUAdam" in args.rivals:  # compiled here once, not by two ranks at the same time
        build("DeepSpeedCPUAdam", Model("24M"))
    results = [measure(size, stage, args.repeats, args.rivals) for size in args.sizes for stage in args.stages]
    return emit(results, args.json)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        os._exit(1)  # a rank that fails alone must not wait for the others at exit
