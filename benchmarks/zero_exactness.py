"""AdamW and LAMB under ZeRO against an unsharded float64 reference: how far the weights are apart after 20 steps.

    python -m benchmarks.zero_exactness                    every stage, precision and accumulation on 1, 2 and 4 ranks
    python -m benchmarks.zero_exactness --ranks 2 --naive  and what LAMB is without per-parameter norms

Each rank trains through the product's own path (`ZeroEngine` over the configuration that the launcher makes) a model of
odd sizes whose gradients are known numbers with few bits, so bf16 and fp32 sum them without rounding and only the
optimizer is compared. The reference, written from the papers in float64, sees whole parameters and the mean gradient.
Clipping is active in every step. Differences are relative to the largest weight of the parameter.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common import emit, run_ranks

STEPS, RATE, DECAY, CLIP, EPS = 20, 1e-2, 0.01, 0.5, 1e-6
BETA1, BETA2 = 0.9, 0.999
#: odd sizes, so that ZeRO's cuts fall inside of parameters and rows; 5 elements are fewer than some ranks have
SHAPES = {
    "embedding.weight": (101, 36),
    "attention.weight": (36, 36),
    "attention.bias": (36,),
    "intermediate.weight": (71, 36),
    "intermediate.bias": (71,),
    "norm.weight": (36,),
    "head.weight": (1, 5),
    "head.bias": (5,),
}
NAMES = list(SHAPES)
BLOCKS = list(dict.fromkeys(name.split(".")[0] for name in NAMES))


@dataclass(frozen=True)
class Case:
    """One way to train."""

    stage: int
    precision: str
    optimizer: str
    accumulation: int


def all_cases() -> list[Case]:
    """Every stage, precision, optimizer and accumulation."""
    choices = itertools.product((0, 1, 2, 3), ("fp32", "bf16"), ("adamw", "lamb"), (1, 2))
    return [Case(*choice) for choice in choices]


def coarse(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Random numbers of 4 significant bits between 1/8 and 1: sums of some of them are exact in bf16."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(8, 16, shape, generator=generator) / 16
    sign = 1 - 2 * torch.randint(2, shape, generator=generator)
    return sign * bits / 2


def weight(name: str) -> Tensor:
    """The initial value of a parameter, exact in bf16."""
    return coarse(NAMES.index(name), SHAPES[name]) / 16


def slope(name: str, step: int, micro: int, rank: int) -> Tensor:
    """The gradient of a parameter in a micro-batch of a rank; sizes differ over parameters and steps."""
    number = NAMES.index(name)
    seed = ((step * 8 + micro) * 8 + rank) * len(NAMES) + number
    return coarse(seed, SHAPES[name]) * 2.0 ** -(number % 4 + step % 3)


class Model(nn.Module):
    """Parameters whose loss is the sum of each element times a given slope."""

    def __init__(self) -> None:
        super().__init__()
        for block in BLOCKS:
            self.add_module(block, Block(block))
        for name, p in self.named_parameters():
            p.data.copy_(weight(name))

    def forward(self, step: int, micro: int, rank: int) -> Tensor:
        return torch.stack([self.get_submodule(block)(step, micro, rank) for block in BLOCKS]).sum()


class Block(nn.Module):
    """The parameters that share a first name."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.block = block
        for name, shape in SHAPES.items():
            if name.startswith(block + "."):
                self.register_parameter(name.split(".")[1], nn.Parameter(torch.zeros(shape)))

    def forward(self, step: int, micro: int, rank: int) -> Tensor:
        sums = []
        for name, p in self.named_parameters():
            sums.append((p.float() * slope(f"{self.block}.{name}", step, micro, rank)).sum())
        return torch.stack(sums).sum()


def reference(optimizer: str, ranks: int, accumulation: int) -> dict[str, Tensor]:
    """Whole weights after `STEPS` steps, in float64.

    AdamW: Loshchilov & Hutter 2019, algorithm 2. LAMB: You et al. 2020, algorithm 2. Neither decays vectors, and LAMB
    takes a trust ratio of 1 for them.
    """
    weights = {name: weight(name).double() for name in SHAPES}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(STEPS):
        parts = list(itertools.product(range(accumulation), range(ranks)))
        grads = {name: sum(slope(name, step, *part).double() for part in parts) for name in SHAPES}
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))  # type: ignore[operator, union-attr]
        factor = CLIP / (norm + 1e-6)
        assert factor < 1, "clipping must be active"
        for name, w in weights.items():
            g = grads[name] * factor
            first[name] = BETA1 * first[name] + (1 - BETA1) * g
            second[name] = BETA2 * second[name] + (1 - BETA2) * g * g
            m, v = first[name] / (1 - BETA1 ** (step + 1)), second[name] / (1 - BETA2 ** (step + 1))
            decay = DECAY if w.ndim > 1 else 0.0
            update = m / (v.sqrt() + EPS) + decay * w
            ratio = w.norm() / update.norm() if optimizer == "lamb" and decay else 1.0
            weights[name] = w - RATE * ratio * update
    return weights


def train(case: Case, rank: int, ranks: int) -> dict[str, Tensor]:
    """Whole fp32 weights after `STEPS` steps under ZeRO, on rank 0."""
    from engine.config import OptimConfig, RunConfig, TrainConfig
    from engine.data.loading.loader import BatchLayout
    from engine.optim.build import build_optimizer
    from engine.zero.engine import ZeroEngine
    from launch.zero.build import deepspeed_config

    config = RunConfig(
        optim=OptimConfig(name=case.optimizer, weight_decay=DECAY, max_grad_norm=CLIP, eps=EPS),  # type: ignore[arg-type]
        train=TrainConfig(zero_stage=case.stage, precision=case.precision),  # type: ignore[arg-type]
    )
    layout = BatchLayout(ranks * case.accumulation, 1, rank, ranks)
    model = Model()
    optimizer = build_optimizer(model, config.optim, torch.device("cpu"))
    zero = ZeroEngine(model, optimizer, deepspeed_config(config, layout, "cpu"))
    for step in range(STEPS):
        for micro in range(case.accumulation):
            zero.backward(zero.model(step, micro, rank))
            zero.step(RATE, last_micro_batch=micro + 1 == case.accumulation)
    weights = zero.full_state_dict()
    zero.model.destroy()
    return weights


def apart(weights: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest difference of a parameter, relative to its largest weight; infinite for NaN."""
    worst = 0.0
    for name, exact in truth.items():
        difference = float((weights[name].double() - exact).abs().max() / exact.abs().max())
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


@contextlib.contextmanager
def naive_norms() -> Any:
    """LAMB as a ZeRO-unaware optimizer has it: each flat partition is one tensor with one trust ratio."""
    from engine.optim.layout import FlatLayout

    def one_tensor(layout: FlatLayout, squares: Tensor) -> Tensor:
        return squares.sum(0).expand(len(layout.names), -1)

    with mock.patch.object(FlatLayout, "whole_squares", one_tensor):
        yield


def worker(folder: Path, cases: list[Case], naive: bool) -> None:
    """One rank: every case, its difference written by rank 0."""
    from engine.train.ranks.join import end_ranks, start_ranks

    world = start_ranks()
    rows = []
    for case in cases:
        with naive_norms() if naive else contextlib.nullcontext():
            weights = train(case, world.rank, world.size)
        if world.is_main:
            truth = reference(case.optimizer, world.size, case.accumulation)
            rows.append({**vars(case), "ranks": world.size, "difference": apart(weights, truth)})
    if world.is_main:
        (folder / "rows.json").write_text(json.dumps(rows))
    end_ranks(world)


def measure(ranks: int, cases: list[Case], naive: bool = False) -> list[dict[str, Any]]:
    """Start the ranks and return a row a case."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = json.dumps([list(vars(case).values()) for case in cases])
        arguments = ["--worker", folder, "--cases", wanted, *(["--naive"] if naive else [])]
        run_ranks("benchmarks.zero_exactness", ranks, arguments)
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
        return rows


def table(rows: list[dict[str, Any]], title: str) -> dict[str, Any]:
    """A row for each stage, precision and number of ranks."""
    rivals: dict[str, dict[str, float]] = {}
    for row in rows:
        where = f"ZeRO-{row['stage']} {row['precision']} {row['ranks']} rank(s)"
        rivals.setdefault(where, {})[f"{row['optimizer']} x{row['accumulation']}"] = row["difference"]
    return {"title": title, "rivals": rivals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--naive", action="store_true", help="add LAMB with a flat partition as one tensor, at ZeRO-2")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, [Case(*values) for values in args.cases], args.naive)
    title = f"Largest relative difference to float64 after {STEPS} steps; x1, x2: accumulation"
    results = [table([row for ranks in args.ranks for row in measure(ranks, all_cases())], title)]
    if args.naive:
        cases = [case for case in all_cases() if case.stage == 2 and case.optimizer == "lamb"]
        rows = [row for ranks in args.ranks for row in measure(ranks, cases, naive=True)]
        results.append(table(rows, "Naive LAMB, the same work: one trust ratio a flat partition"))
    return emit(results, args.json)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        os._exit(1)  # a rank that fails alone must not wait for the others at exit
