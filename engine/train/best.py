"""The weights of the best evaluation: a run's export holds them, and a checkpoint records which evaluation that is.

The two must agree. A run that resumes from an earlier checkpoint, after a crash, a rollback or by choice, may never
reach the evaluation again that an export was made at.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from engine.config import TrainConfig
from engine.model.folder import is_intact, read_origin
from engine.tasks.task import Best, Evaluation, Task
from engine.train import earlier
from engine.train.checkpoint.folder import RunState
from engine.train.log import say


def of_state(state: RunState) -> Best | None:
    """The best evaluation that a checkpoint records; None without one."""
    return None if state.best is None else Best(state.best, state.best_step)


def recorded(best: Best | None) -> dict[str, Any]:
    """The fields of a checkpoint's state that record the best evaluation; the reverse of `of_state`."""
    return {"best": None, "best_step": None} if best is None else {"best": best.value, "best_step": best.step}


def is_better(evaluation: Evaluation, best: Best | None, task: Task) -> bool:
    """Whether an evaluation is better than the best so far; never where the task names no metric for the best.

    Any number is better than NaN, which a correlation of equal predictions is.
    """
    name = task.best_metric
    if name is None or best is None:
        return name is not None
    if math.isnan(best.value):
        return not math.isnan(evaluation.scalars[name])
    sign = 1.0 if task.higher_is_better else -1.0
    return sign * evaluation.scalars[name] > sign * best.value


def patience_is_over(best: Best | None, step: int, train: TrainConfig) -> bool:
    """Whether the last train.patience evaluations, the one after `step` steps included, were no better than the best.

    Nothing but the best's step and the interval of the evaluations decides, so a resume counts on where the run was.
    """
    if train.patience is None or best is None or best.step is None:
        return False
    return step - best.step >= train.patience * train.eval_interval


def ends_early(best: Best | None, step: int, total: int, task: Task, train: TrainConfig) -> bool:
    """Whether the evaluation after `step` of `total` steps ends the run; the main rank says so."""
    if step == total or not patience_is_over(best, step, train):
        return False
    assert best is not None
    say(
        f"no better {task.best_metric} than {best.value:.4f}, at step {best.step}, in {train.patience} evaluation(s) "
        f"(train.patience): the run ends at step {step} of {total}"
    )
    return True


def of_evaluation(evaluation: Evaluation, step: int, task: Task) -> Best:
    """The record of an evaluation after `step` steps, of a task that names a metric for the best."""
    assert task.best_metric is not None
    return Best(evaluation.scalars[task.best_metric], step)


def holds(exported: Path, best: Best | None, step: int) -> bool:
    """Whether a folder is an intact export of the best evaluation or, where the run has no best, of step `step`."""
    origin = read_origin(exported) or {}
    told = origin.get("best")
    if best is None:
        fits = told is None and origin.get("step") == step
    else:
        fits = told is not None and (told.get("value"), told.get("step")) == (best.value, best.step)
    return fits and is_intact(exported)


def regain(state: RunState, start: Path, output: Path) -> Best | None:
    """The best evaluation of a run that resumes from the checkpoint `start`, with its weights in the run's export.

    An export of another evaluation is set aside. The weights may be in the export beside the checkpoint, in another
    run's folder; where they are in neither, None is returned and the best is chosen anew.
    """
    best, exported = of_state(state), output / "export"
    if best is not None and holds(exported, best, state.step):
        return best
    if best is not None or (read_origin(exported) or {}).get("best") is not None:
        earlier.move(output, ("export",))
    if best is None:
        return None
    source = start.resolve().parent.parent / "export"
    if source != exported.resolve() and holds(source, best, state.step):
        shutil.copytree(source, exported)
        return best
    print(
        f"the weights of the best evaluation, {best.value:.4f} at step {best.step}, are not in {source}: "
        "the best is chosen anew from here on",
        flush=True,
    )
    return None
