"""Parts of labelled examples for k-fold cross-validation: each example is held out in exactly one of the folds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.config import LabelledConfig
from engine.errors import UserError

#: first word of the seed of the folds, so that they are independent of the epochs' orders
FOLD_STREAM = 3


def fold_of(labelled: LabelledConfig, labels: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Split examples into (kept, held out) as `labelled.fold` and `labelled.folds` say, both in file order.

    The folds are stratified: each has the examples of every class in the same share, give or take one, and as many
    examples as any other, give or take one. Which examples they hold depends on the labels and the seed alone.

    Args:
        labelled: with both fields given.
        labels: class of every example; the same for all where there are no classes.
        seed: of the run.

    Raises:
        UserError: a class with fewer examples than there are folds.
    """
    assert labelled.fold is not None
    assert labelled.folds is not None
    generator = np.random.default_rng([FOLD_STREAM, seed])
    array = np.asarray(labels)
    folds = np.empty(len(array), dtype=np.int64)
    dealt = 0
    for name in np.unique(array):
        members = np.flatnonzero(array == name)
        if len(members) < labelled.folds:
            which = f" of {str(name)!r}" if name else ""
            remedy = f"give at most {len(members)}" if len(members) > 1 else "join the class to another, or remove it"
            raise UserError(
                f"labelled.folds: {labelled.folds} is not allowed; {labelled.train} has {len(members)} example(s)"
                f"{which}, and each fold needs one; {remedy}"
            )
        folds[generator.permutation(members)] = (dealt + np.arange(len(members))) % labelled.folds + 1
        dealt += len(members)
    held = folds == labelled.fold
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()
