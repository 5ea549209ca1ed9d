"""Evaluations during training: the task's scores on held-out data, how they are recorded and printed."""

from __future__ import annotations

import numpy as np

from engine import dist
from engine.data.loading.loader import evaluation_batches
from engine.data.loading.source import SampleSource
from engine.model.roundtrip import SAMPLES, Sample, packed_samples
from engine.tasks.task import Evaluation, Task
from engine.train.curves.monitor import Monitor
from engine.train.log import say
from engine.train.watch.guard import Guard
from engine.zero.engine import ZeroEngine


def evaluate(
    task: Task, source: SampleSource, zero: ZeroEngine, guard: Guard, world: dist.World, micro_batch: int
) -> Evaluation:
    """The scores of the current weights, with the samples divided among the ranks; collective.

    Args:
        source: the held-out samples.
        micro_batch: sequences of a rank's forward pass.

    Raises:
        Stopped: all ranks were asked to stop; on every rank.
    """
    batches = evaluation_batches(source, world.rank, world.size, micro_batch, task.evaluation_samples)
    moved = (batch.to(zero.device) for batch in guard.evaluated(batches))
    with zero.evaluating() as model:
        return task.evaluate(model, moved)


def tell(evaluation: Evaluation, step: int, monitor: Monitor, *, texts: bool, praise: str) -> None:
    """Write an evaluation to the curves and print its scores; on rank 0.

    Args:
        step: optimizer steps done.
        texts: whether to write the evaluation's texts to TensorBoard, too.
        praise: what to add to the printed line, empty for nothing.
    """
    monitor.scalars({f"eval/{name}": value for name, value in evaluation.scalars.items()}, step)
    for name, markdown in evaluation.texts.items() if texts else ():
        monitor.text(f"eval/{name}", markdown, step)
    for name, pixels in evaluation.images.items():
        monitor.image(f"eval/{name}", pixels, step)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in evaluation.scalars.items())
    say(f"evaluation at step {step}: {shown}{praise}")


def first_samples(task: Task) -> list[Sample] | None:
    """Held-out samples to compare an export on; None where there are none, or their tensors are none that we know."""
    source = task.evaluation_source("validation")
    if source is None:
        return None
    few = np.arange(min(SAMPLES, source.epoch_size(0)))
    return packed_samples(source.collate(source.describe(0, few)))
