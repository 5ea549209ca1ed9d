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
#: scores that choose a token classifier's best checkpoint
_ENTITY_METRICS = {"f1": True, "precision": True, "recall": True, "accuracy": True, "loss": False}


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

TOKEN_CLASSIFICATION = TaskEntry(
    about="entities: a tag for each word of a text",
    section="labelled",
    options=LabelledConfig,
    implementation="engine.tasks.tokens.classification:TokenClassification",
    length="max_length",
    inputs=("train", "validation", "test"),
    required=("train",),
    starts_fresh=False,
    read_share=lambda config: 1.0,
    pools=lambda config: False,
    fixed=("text", "label", "max_length", "stride", "label_pieces", "metric", "group_by_length", "folds", "fold"),
    grouping="group_by_length",
    metrics=_ENTITY_METRICS,
    compared=("max_length", "stride", "label_pieces", "group_by_length"),
    results=tuple(f"{part}/{name}" for part in ("test", "eval") for name in _ENTITY_METRICS),
    scores={
        "f1": Title("F1 of entities", "Harmonic mean of precision and recall, 0 to 1."),
        "precision": Title("precision of entities [share]", "Predicted ones with the words and type of a true one."),
        "recall": Title("recall of entities [share]", "True ones that are predicted with their words and type."),
        "accuracy": Title("accuracy [share]", "Examples classified right."),
    },
    validate=validate_labelled,
)
