"""Runs whose training steps tell what dropout would draw in them and how many tokens they have.

python -m torch.distributed.run --nproc_per_node=2 -m tests.train.observed STORE SAVED FOLDER trains on two ranks from
the beginning (FOLDER/fresh) and from the checkpoints of steps 2 and 4 in SAVED, and writes what `observed` returns for
each of the three to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine import dist
from engine.data.loading.source import MicroBatch
from engine.train.ranks.join import end_ranks, start_ranks

#: numbers that dropout would draw
DRAWN = 64
#: seconds that `delayed` adds
DELAY = 1.5


def delayed(output: Path, options: list[str]) -> None:
    """Train on one rank, where the first save and the first evaluation take `DELAY` longer."""
    from engine.tasks.pretrain import Pretraining

    sync, evaluate, waits = os.fsync, Pretraining.evaluate, {"save": DELAY, "evaluation": DELAY}

    def slow_sync(file: int) -> None:
        time.sleep(waits.pop("save", 0.0))
        sync(file)

    def slow_evaluate(self: Pretraining, *arguments: Any) -> Any:
        time.sleep(waits.pop("evaluation", 0.0))
        return evaluate(self, *arguments)

    with mock.patch.object(os, "fsync", slow_sync), mock.patch.object(Pretraining, "evaluate", slow_evaluate):
        observed(output, ["--train.async_save=false", *options])
    assert not waits, "there was neither a save nor an evaluation"


def observed(
    output: Path, options: list[str], world: dist.World | None = None, spoiled: int | None = None
) -> list[dict[str, Any]]:
    """Train as this rank of a run; of each micro-batch: its global batch (from 1), tokens, and what dropout draws.

    On rank 1 alone the loss of the global batch `spoiled` is no number.
    """
    from engine.tasks.pretrain import Pretraining
    from engine.tasks.task import StepOutput
    from engine.train.watch.preempt import StopRequest
    from engine.train.watch.session import Session
    from engine.train.watch.watchdog import Watchdog
    from launch.configure.options import parse_given
    from launch.launcher import Launcher
    from launch.train import run
    from tests.train.runs import SMALL

    world = world or dist.World()
    original, found = Pretraining.step, []

    def step(self: Pretraining, model: Any, batch: MicroBatch) -> StepOutput:
        with torch.random.fork_rng(devices=[]):
            kept = torch.nn.functional.dropout(torch.ones(DRAWN)).bool().tolist()
        tokens = batch.inputs["input_ids"].numel()
        number = batch.cursor.consumed // 16
        found.append({"batch": number, "tokens": tokens, "kept": kept})
        output = original(self, model, batch)
        return replace(output, loss=output.loss * math.nan) if (world.rank, number) == (1, spoiled) else output

    config, given = parse_given([*SMALL, f"--output={output}", *options])
    with mock.patch.object(Pretraining, "step", step):
        session = Session(config, world, StopRequest(), Watchdog(output, world.rank, world.size))
        run(config, Launcher("none", world.size), session, given)
    return found


def evaluated(model: Path, options: list[str]) -> dict[str, float]:
    """The scores of an exported model on the held-out samples of a run, by this process alone."""
    from engine.data.loading.loader import evaluation_batches
    from engine.model.pretrained import load_pretrained
    from engine.tasks.pretrain import Pretraining
    from launch.configure.options import parse
    from tests.train.runs import SMALL

    task = Pretraining(parse([*SMALL, *options]))
    bert, source, cpu = task.build_model(), task.evaluation_source("validation"), torch.device("cpu")
    load_pretrained(bert, model)
    assert source is not None
    batches = evaluation_batches(source, 0, 1, 4, task.config.train.eval_samples)
    with torch.no_grad():
        return task.evaluate(bert.eval(), (batch.to(cpu) for batch in batches)).scalars


def main(store: str, saved: Path, folder: Path) -> None:
    world = start_ranks(1, timedelta(minutes=2))
    data = f"--data.path={store}"
    found = {"fresh": observed(folder / "fresh", [data, "--train.steps=4", "--train.save_interval=2"], world)}
    for step in (2, 4):
        resume = [f"--resume={saved / f'step-{step:06d}'}", f"--train.steps={step + 1}", "--train.save_interval=null"]
        found[str(step)] = observed(folder / f"from-{step}", [data, *resume], world)
    skipping = [data, "--train.steps=4", "--train.save_interval=null", "--fault.non_finite=skip"]
    observed(folder / "spoiled", skipping, world, spoiled=2)
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    end_ranks(world)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
