"""Labels of examples as class ids, and a share of the examples that is held out. Shapes: N examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from engine.data.labelled.files import Examples
from engine.data.loading.source import Indices
from engine.errors import UserError

HELD_OUT_SHARE = 0.1
#: fewer training examples are a trial, in which a class with a single example is no mistake
FEW_EXAMPLES = 20
#: first word of the seed of the choice of held-out examples, so that the epochs' orders are independent of it
HOLD_OUT_STREAM = 1

T = TypeVar("T")


def class_names(training: Examples) -> tuple[str, ...]:
    """Names of the classes, in the order of their ids.

    The order is the one that the data set declares, else numeric where every name is a number, else alphabetic:
    the same for every order of the examples.

    Raises:
        UserError: all examples have the same label, or most labels occur only once.
    """
    present = set(training.labels)
    if len(present) < 2:
        only = next(iter(present))
        raise UserError(f"{training.path}: every label is {only!r}; give at least two classes, or set labelled.label")
    _refuse_ids(training)
    if training.names is not None:
        return training.names
    try:
        return tuple(sorted(present, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(present))


def _refuse_ids(training: Examples) -> None:
    """Raise if the labels look like identifiers of examples instead of classes: most occur only once."""
    single = sum(count == 1 for count in Counter(training.labels).values())
    if len(training) >= FEW_EXAMPLES and single > len(training) / 2:
        raise UserError(
            f"{training.path}: {single:,} of {len(training):,} examples have a label of their own; "
            "set labelled.label to the column of the class"
        )


def class_ids(examples: Examples, names: Sequence[str]) -> Indices:
    """Class id of every example, int64 [N].

    Raises:
        UserError: a label that is not among `names`.
    """
    ids = {name: number for number, name in enumerate(names)}
    for index, label in enumerate(examples.labels):
        if label not in ids:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(
                f"{examples.place(index)}: label {label!r} is not among the training examples ({known}); "
                "correct it or add training examples of it"
            )
    return np.array([ids[label] for label in examples.labels], dtype=np.int64)


def hold_out(labels: Sequence[str], seed: int, share: float = HELD_OUT_SHARE) -> tuple[list[int], list[int]]:
    """Split examples into (kept, held out), both in file order, with `share` of every class held out.

    Every class keeps at least one example; a class too small to spare one has none held out.
    """
    generator = np.random.default_rng([HOLD_OUT_STREAM, seed])
    array = np.asarray(labels)
    held: list[int] = []
    for name in np.unique(array):
        members = np.flatnonzero(array == name)
        count = min(round(share * len(members)), len(members) - 1)
        held += generator.permutation(members)[:count].tolist()
    chosen = set(held)
    return [index for index in range(len(array)) if index not in chosen], sorted(held)


def split_validation(training: Examples, seed: int) -> tuple[Examples, Examples]:
    """Training examples and the tenth of them that is held out for validation.

    Raises:
        UserError: too few examples to hold any out, or most labels occur only once.
    """
    _refuse_ids(training)
    kept, held = hold_out(training.labels, seed)
    if not held:
        count = len(training)
        raise UserError(f"{training.path}: {count} examples are too few to hold some out; set labelled.validation")
    return select(training, kept), select(training, held)


def select(examples: Examples, indices: Sequence[int]) -> Examples:
    """The examples at `indices`."""

    def pick(values: list[T]) -> list[T]:
        return [values[index] for index in indices]

    return replace(
        examples,
        texts=pick(examples.texts),
        pairs=None if examples.pairs is None else pick(examples.pairs),
        labels=pick(examples.labels),
        positions=pick(examples.positions),
    )
