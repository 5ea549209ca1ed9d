"""The end of a run: evaluate what was exported, and write the report."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from engine import dist
from engine.config import RunConfig
from engine.data.loading.loader import BatchLayout, evaluation_batches
from engine.tasks.task import Evaluation, Task
from engine.train.curves.monitor import write_report
from engine.train.result import RunResult


@torch.no_grad()
def evaluate_export(task: Task, exported: Path, split: str, micro_batch: int, world: dist.World) -> Evaluation | None:
    """Evaluate an exported model on a split, its examples dealt among the ranks; collective.

    The weights are read back from the folder, so the figures are those of what a user would deploy.
    """
    source = task.evaluation_source(split)
    if source is None:
        return None
    model = task.load_export(exported)
    model.to(world.device).eval()
    batches = evaluation_batches(source, world.rank, world.size, micro_batch, 0)
    return task.evaluate(model, (batch.to(world.device) for batch in batches))


def chosen(result: RunResult, metric: str | None) -> str:
    """Which weights were exported, and how to have the others."""
    if result.best is None or result.best.step is None:
        return ""
    told = f" (best {metric} {result.best.value:.4f}, at step {result.best.step} of {result.steps}"
    if result.best.step != result.steps:
        told += "; zerobert export RUN --weights last gives the last step's"
    return told + ")"


def final_report(task: Task, config: RunConfig, result: RunResult, layout: BatchLayout, world: dist.World) -> None:
    """Evaluate the best checkpoint on the test examples (or the validation ones) and print the report; collective."""
    evaluation, split = result.evaluation, "validation"
    if task.best_metric is not None:
        dist.barrier()
        for split in ("test", "validation"):
            evaluation = evaluate_export(task, result.exported, split, layout.micro_batch, world)
            if evaluation is not None:
                break
    if world.is_main and evaluation is not None:
        folder = Path(config.output) / "report"
        print(text := task.report(evaluation, folder))
        write_report(config, result.steps, split, evaluation, text)
        print(f"model     {result.exported}{chosen(result, task.best_metric)}")
        if config.monitor.tensorboard:
            print(f"curves    tensorboard --logdir {Path(config.output) / 'tensorboard'}")
        sys.stdout.flush()
