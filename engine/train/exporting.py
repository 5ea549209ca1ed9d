"""What a run exports: its weights, with the record of where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.model.adapters.folder import export_trained
from engine.model.folder import TUNED
from engine.tasks.task import Best, Evaluation, Task
from engine.train.evaluation import first_samples


def write_export(
    task: Task,
    weights: Mapping[str, Tensor],
    described: Any,
    tokenizer: Mapping[str, bytes],
    out: Path,
    step: int,
    best: Best | None,
    evaluation: Evaluation | None,
    facts: Mapping[str, Any],
) -> None:
    """Write a folder of the weights after a step.

    Args:
        described: the configuration with the class of transformers.
        evaluation: the one that chose the weights, if any did.

    Raises:
        UserError: the library that is to open the folder doesn't compute from it what the run's model does.
    """
    chosen = None if best is None else {"metric": task.best_metric, **asdict(best)}
    tuned = {} if evaluation is None else evaluation.tuned
    origin = {"step": step, "best": chosen, "facts": facts, TUNED: tuned}
    export_trained(weights, described, tokenizer, out, origin, task.adaptation, first_samples(task))
