"""A classifier's opinion of rows: whether new ones still are of their class, and what unlabelled ones are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.data.labelled.files import label_of
from engine.data.labelled.tables import place
from engine.errors import UserError
from engine.predict.model import open_folder
from engine.predict.options import PredictConfig
from engine.predict.predictor import predictor_of
from engine.predict.rows import Row
from engine.predict.sequence import SINGLE, SequencePredictor
from engine.predict.worker import compute_chunk
from launch.augment.options import AugmentConfig

#: what a classifier says of a row: its class, the confidence in it, and the probability of each class
Opinion = Mapping[str, Any]
Judge = Callable[[Sequence[Row]], Sequence[Opinion]]


def judge_of(config: AugmentConfig, columns: Sequence[str]) -> tuple[Judge, str]:
    """A classifier, as a function of rows, and its fingerprint.

    Args:
        columns: of the text and, for pairs, of the second text.

    Raises:
        UserError: the folder is of no model that tells one class of several.
    """
    option = "model" if config.keep_by is None else "keep_by"
    folder = config.model if config.keep_by is None else config.keep_by
    assert folder is not None
    try:
        opened = open_folder(folder)
    except UserError as error:  # which calls any folder model
        raise UserError(f"{option}: {str(error).removeprefix('model: ')}") from error
    wanted = PredictConfig(
        folder,
        config.input,
        config.output,
        text=columns[0],
        text_pair=columns[1] if len(columns) > 1 else None,
        probabilities=opened.head == "sequence_classification",
        device=config.device,
        processes=config.processes,
    )
    predictor = predictor_of(opened, wanted) if wanted.probabilities else None
    if not isinstance(predictor, SequencePredictor) or predictor.problem != SINGLE:
        raise UserError(f"{option}: {folder!r} is no classifier of one class a text; give the folder of one")
    return lambda rows: compute_chunk(wanted, rows).columns, opened.fingerprint()


def keeps_class(config: AugmentConfig, row: Row, opinion: Opinion) -> bool:
    """Whether a row's own label is as probable as is asked for.

    Raises:
        UserError: the classifier doesn't know the label.
    """
    where = place(config.input, row.position)
    label = label_of(row.record[config.label], config.label, where, None)
    shares: Mapping[str, float] = opinion["probabilities"]
    if label not in shares:
        known = ", ".join(list(shares)[:10])
        raise UserError(f"{where}: keep_by {config.keep_by!r} knows no class {label!r}, only {known}; give another")
    return shares[label] >= config.confidence
