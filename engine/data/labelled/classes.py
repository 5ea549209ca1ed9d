"""Labels of examples as class ids, and a share of the examples that is held out. Shapes: N examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from engine.config import LabelledConfig
from engine.data.labelled.files import Examples
from engine.data.labelled.folds import fold_of
from engine.data.loading.source import Indices
from engine.errors import UserError

HELD_OUT_SHARE = 0.1
#: fewer training examples are a trial, in which a class with a single example is no mistake
FEW_EXAMPLES = 20
#: first word of the seed of the choice of held-out examples, so that the epochs' orders are independent of it
HOLD_OUT_STREAM = 1
#: that of the choice of examples that are learned from
LIMIT_STREAM = 4

T = TypeVar("T")


def class_names(training: Examples, *, drawn: bool = False) -> tuple[str, ...]:
    """Names of the classes, in the order of their ids.

    The order is the one that the data set declares, else numeric where every name is a number, else alphabetic:
    the same for every order of the examples.

    Args:
        drawn: whether the examples are few of many, among which a class may well occur once.

    Raises:
        UserError: all examples have the same label, or most labels occur only once.
    """
    present = set(training.labels)
    if len(present) < 2:
        only = next(iter(present))
        raise UserError(f"{training.path}: every label is {only!r}; give at least two classes, or set labelled.label")
    if not drawn:
        _refuse_ids(training)
    return training.names if training.names is not None else sorted_names(present)


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names in numeric order where each is a number, else in alphabetical order."""
    return tuple(sorted(names, key=lambda name: (float(name), name)) if all(map(_is_number, names)) else sorted(names))


def check_order(training: Examples, names: Sequence[str]) -> None:
    """Refuse classes in an order that nobody gave: neither numbers nor declared.

    Raises:
        UserError: names some of them.
    """
    if training.names is None and not all(map(_is_number, names)):
        raise UserError(
            f"labelled.loss: 'ordinal' is not allowed; {training.path} tells no order of its classes ({_some(names)}): "
            "give numbers for labels, or a data set that declares them (a ClassLabel of datasets)"
        )


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


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
            raise UserError(
                f"{examples.place(index)}: label {label!r} is not among the training examples ({_some(names)}); "
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


def split_validation(training: Examples, labelled: LabelledConfig, seed: int) -> tuple[Examples, Examples]:
    """Training examples and those of them that are held out for validation, see `held_out`.

    Raises:
        UserError: too few examples to hold any out, or most labels occur only once.
    """
    _refuse_ids(training)
    kept, held = held_out(labelled, training.labels, seed)
    return select(training, kept), select(training, held)


def split_any(training: Examples, labelled: LabelledConfig, seed: int) -> tuple[Examples, Examples]:
    """As `split_validation`, of examples without classes.

    Raises:
        UserError: too few examples to hold any out.
    """
    kept, held = held_out(labelled, [""] * len(training), seed)
    return select(training, kept), select(training, held)


def held_out(
    labelled: LabelledConfig, labels: Sequence[str], seed: int, what: str = "examples"
) -> tuple[list[int], list[int]]:
    """The training examples that are learned from and those that are held out, both in file order.

    Held out are a fold where there are folds, else a tenth, or none where there is a file of validation examples. Of
    the others labelled.limit are learned from, see `drawn`.

    Args:
        labels: class of every example; the same for all where there are no classes.
        what: the examples are, for a message.

    Raises:
        UserError: too few examples to hold any out, or fewer than labelled.limit.
    """
    kept, held = list(range(len(labels))), list[int]()
    if labelled.folds is not None:
        kept, held = fold_of(labelled, labels, seed)
    elif labelled.validation is None:
        kept, held = hold_out(labels, seed)
        if not held:
            raise UserError(
                f"{labelled.train}: {len(labels)} {what} are too few to hold some out; set labelled.validation"
            )
    if labelled.limit is None:
        return kept, held
    _check_limit(labelled, len(kept), len(set(labels)), what)
    return [kept[place] for place in drawn([labels[index] for index in kept], labelled.limit, seed)], held


def _check_limit(labelled: LabelledConfig, most: int, least: int, what: str) -> None:
    limit = labelled.limit
    assert limit is not None
    if limit > most:
        rest = " that are not held out" if labelled.validation is None else ""
        remedy = f"{labelled.train} has {most} {what}{rest}: give at most that, or null for all"
    elif limit < least:
        remedy = f"{labelled.train} has {what} of {least} classes, and learning needs one of each: give at least that"
    else:
        return
    raise UserError(f"labelled.limit: {limit} is not allowed; {remedy}")


def drawn(labels: Sequence[str], count: int, seed: int) -> list[int]:
    """Draw `count` examples, in file order: of every class one or more, and the same share give or take one.

    Those of a smaller count are among those of a larger one. Which they are depends on the labels and the seed alone.

    Args:
        labels: class of every example.
        count: at least as many as there are classes.
    """
    generator = np.random.default_rng([LIMIT_STREAM, seed])
    array = np.asarray(labels)
    turn = np.empty(len(array))
    for name in np.unique(array):
        members = np.flatnonzero(array == name)
        turn[generator.permutation(members)] = np.arange(len(members)) / len(members)
    order: list[int] = np.lexsort((generator.permutation(len(array)), turn)).tolist()
    return sorted(order[:count])


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
