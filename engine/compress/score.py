"""The score of any module on a task's examples, with what it got on each, so that two modules can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from engine.data.loading.loader import evaluation_batches
from engine.errors import UserError
from engine.tasks.outcomes import Outcomes, interval, read_outcomes, score_of
from engine.tasks.significance import Difference, paired
from engine.tasks.task import Task

#: in the order in which a run's final report takes one
SPLITS = ("test", "validation")
MICRO_BATCH = 32


@dataclass(frozen=True)
class Score:
    """What a module got on a split."""

    metric: str
    """a score of single examples, of which more is better"""
    outcomes: Outcomes

    @property
    def value(self) -> float:
        """Of the metric, over all examples."""
        return float(score_of(self.metric, self.outcomes.scores[self.metric]))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the value."""
        return interval(self.metric, self.outcomes.scores[self.metric])


def scored_split(task: Task) -> str:
    """The split that models are scored on: the test examples where there are some, else the validation examples.

    Raises:
        UserError: the task has neither.
    """
    found = next((split for split in SPLITS if task.evaluation_source(split) is not None), None)
    if found is None or task.best_metric is None:
        raise UserError("data: its task scores no single examples; give a run that fine-tunes, or a labelled file")
    return found


def score(task: Task, module: nn.Module, split: str | None = None) -> Score:
    """Score a module in this process.

    Args:
        task: whose examples, metric and report are used; its own model isn't.
        module: takes the task's packed batches as the task's own model does, such as a model read from a folder.
        split: "test" or "validation"; None as `scored_split` says.

    Returns:
        The task's best metric where it tells of single examples and more of it is better, else the report's main one.
    """
    source = task.evaluation_source(split or scored_split(task))
    assert source is not None
    evaluation = task.evaluate(module, evaluation_batches(source, 0, 1, MICRO_BATCH, 0))
    with TemporaryDirectory() as folder:
        task.report(evaluation, Path(folder))
        outcomes = read_outcomes(Path(folder))
    chosen = task.best_metric if task.higher_is_better else None
    return Score(chosen if chosen in outcomes.scores else next(iter(outcomes.scores)), outcomes)


def change(before: Score, after: Score) -> Difference:
    """How far the second score of the same examples is above the first, with the interval of the paired test."""
    return paired(before.metric, before.outcomes.scores[before.metric], after.outcomes.scores[before.metric])


def check_classes(names: tuple[str, ...] | None, config: Any) -> None:
    """Refuse examples whose classes aren't the model's, in its order.

    Args:
        names: those of the task, in the order of their ids; None of a task without classes.
        config: the model's transformers configuration; its names LABEL_0, ... stand for any.

    Raises:
        UserError: they differ.
    """
    if names is None:
        return
    own = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    nameless = own == tuple(f"LABEL_{index}" for index in range(len(names)))
    if own != names and not nameless:
        raise UserError(
            f"data: its classes are {', '.join(names[:10])} and the model's {', '.join(own[:10])}; give examples of "
            "all of the model's classes and of no other"
        )
