"""Where a run starts: at step 0 or from a checkpoint that its configuration must not contradict; or that it is done."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.config import RunConfig, TrainConfig
from engine.errors import UserError
from engine.tasks import identity
from engine.tasks.task import Task
from engine.train import best
from engine.train.checkpoint import folder as checkpoint

DEFAULT_STEPS = 1000
#: the file that is written last in a report's folder
LAST_OF_REPORT = "report.txt"


def total_steps(train: TrainConfig, epoch_size: int) -> int:
    """Optimizer steps of the run, from train.steps or train.epochs."""
    if train.steps is not None:
        return train.steps
    if train.epochs is not None:
        return max(1, math.ceil(train.epochs * epoch_size / train.global_batch))
    return DEFAULT_STEPS


def find_start(config: RunConfig) -> Path | None:
    """The checkpoint that the run resumes from, verified and compared with its configuration; None for a new run.

    Collective, and called before anything is built.

    Raises:
        UserError: `resume` asks for a checkpoint that doesn't exist, is damaged or contradicts the run.
    """
    path = checkpoint.find(config.resume, Path(config.output) / "checkpoints")
    if path is not None:
        checkpoint.check_resumable(checkpoint.read_state(path), path, config.to_dict())
    return path


def recorded_facts(task: Task, config: RunConfig, start: Path | None) -> dict[str, Any]:
    """What the run's checkpoints record of its data and model, compared with the checkpoint that it resumes from.

    Raises:
        UserError: the checkpoint was made with other data, or is beyond the end of the run.
    """
    facts = task.facts()
    if start is not None:
        state = checkpoint.read_state(start)
        if state.facts is not None:
            identity.check_same(facts, state.facts, start)
        total = total_steps(config.train, task.train_source().epoch_size(0))
        if total < state.step:
            field = "train.steps" if config.train.epochs is None else "train.epochs"
            raise UserError(
                f"{field}: the run would end at step {total} and {start} is at step {state.step}; "
                f"give at least {state.step} steps, or another --output"
            )
    return identity.values(facts)


def tell_loaded(task: Task, config: RunConfig) -> None:
    """Report which tensors of the start model (`model.init_from`) were loaded; each one in the run's folder."""
    folder = config.model.init_from
    if task.loaded is not None:
        print(f"weights of {folder}: {task.loaded}", flush=True)
        values = {"folder": folder, **asdict(task.loaded)}
        (Path(config.output) / "loaded_weights.json").write_text(json.dumps(values, indent=1) + "\n")


def told_over(config: RunConfig, start: Path) -> str:
    """The message for a run that is done already."""
    changed = checkpoint.changes(checkpoint.read_state(start), config.to_dict())
    without = f"; without effect: {changed}" if changed else ""
    return f"{config.output} is finished; its model is in export/ and nothing was changed{without}"


def is_over(task: Task, config: RunConfig, start: Path | None, facts: dict[str, Any]) -> bool:
    """Whether nothing is left to do: the last step is saved, and its export and report exist."""
    output = Path(config.output)
    if start is None or start.parent.resolve() != (output / "checkpoints").resolve():
        return False
    state = checkpoint.read_state(start)
    total = total_steps(config.train, task.train_source().epoch_size(0))
    if state.step != total or state.facts != facts:
        return False
    if not best.holds(output / "export", best.of_state(state), step=total):
        return False
    return task.best_metric is None or (output / "report" / LAST_OF_REPORT).is_file()
