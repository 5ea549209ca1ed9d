"""The entries of tasks on labelled data in the table of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config.check import require
from engine.config.data import LabelledConfig
from engine.config.task_entry import TaskEntry, Title

if TYPE_CHECKING:
    from engine.config.run import RunConfig


#: scores that choose a classifier's best checkpoint, and whether a higher one is better
_METRICS = {"accuracy": True, "macro_f1": True, "matthews": True, "loss": False}


def validate_labelled(config: RunConfig, complete: bool) -> None:
    """The checks of every task that learns from `labelled.train` and starts from a model."""
    train, start = config.labelled.train, config.model.init_from
    require(bool(train) or not complete, "labelled.train", train, "give a file of labelled examples")
    require(bool(start) or not complete, "model.init_from", start, "give the folder of a model")


SEQUENCE_CLASSIFICATION = TaskEntry(
    about="one label a text or pair of texts",
    section="labelled",
    options=LabelledConfig,
    implementation="engine.tasks.sequence:SequenceClassification",
    length="max_length",
    inputs=("train", "validation", "test"),
    required=("train",),
    starts_fresh=False,
    fixed=("text", "text_pair", "label", "max_length", "metric", "group_by_length", "folds", "fold"),
    grouping="group_by_length",
    metrics=_METRICS,
    compared=("max_length", "group_by_length"),
    results=tuple(f"{part}/{name}" for part in ("test", "eval") for name in _METRICS),
    scores={
        "accuracy": Title("accuracy [share]", "Examples classified right."),
        "macro_f1": Title("macro F1", "Mean of the classes' F1 scores, 0 to 1; rare classes count as frequent ones."),
        "matthews": Title("Matthews correlation", "-1 to 1; 0 is guessing, whatever the shares of the classes."),
    },
    validate=validate_labelled,
)
