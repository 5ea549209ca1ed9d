"""Examples with any number of labels each. Shapes: N examples, L labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import LabelledConfig
from engine.data.labelled.classes import FEW_EXAMPLES, held_out, select, sorted_names
from engine.data.labelled.files import Examples, label_of, read_with
from engine.data.labelled.tables import Columns, columns_in, of_field
from engine.errors import UserError

#: what a column of one label may hold, and whether the example has the label then
_MARKS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


@dataclass(frozen=True)
class SetExamples(Examples):
    """Texts with a set of labels each; `labels` has the sets as texts."""

    sets: list[tuple[str, ...]] = field(default_factory=list)
    """names of each example's labels, perhaps none"""


def read_sets(path: str, text: str, text_pair: str | None, label: str, separator: str) -> SetExamples:
    """Read examples with any number of labels.

    Args:
        path, text, text_pair: as of `read_examples`.
        label: a column of lists, or of texts with a separator between labels; or several columns, see `columns_in`,
            which hold 1 where an example has the label that the column is called after, and else 0.
        separator: between the labels of a text.

    Raises:
        UserError: as `read_examples`; a label that is neither text nor a whole number, or is there twice; a mark that
            is neither 0 nor 1.
    """
    names = columns_in(label)
    if not names:
        raise UserError(f"labelled.label: {label!r} is not allowed; give a column of lists, or several as a,b,c")
    sets: list[tuple[str, ...]] = []

    def joined(record: Mapping[str, Any], where: str, declared: tuple[str, ...] | None) -> str:
        if len(names) > 1:
            sets.append(tuple(name for name in names if _marked(record[name], name, where)))
        else:
            sets.append(_listed(record[names[0]], names[0], where, declared, separator))
        return separator.join(sets[-1])

    columns = Columns(text, text_pair, names[0], of_field("labelled.label", names)[1:])
    examples = read_with(path, columns, joined)
    declared = names if len(names) > 1 else examples.names
    return SetExamples(path, examples.texts, examples.pairs, examples.labels, examples.positions, declared, sets)


def _marked(value: object, column: str, where: str) -> bool:
    mark = _MARKS.get(str(value).strip().lower())
    if mark is None:
        raise UserError(f"{where}: column {column!r} holds {value!r:.60}; give 1 where the example has it, and else 0")
    return mark


def _listed(
    value: object, column: str, where: str, declared: tuple[str, ...] | None, separator: str
) -> tuple[str, ...]:
    if isinstance(value, str):
        items: list[object] = [item for item in value.split(separator) if item.strip()]
    elif isinstance(value, list):
        items = value
    else:
        items = [value]
    found = tuple(_name(item, column, where, declared) for item in items)
    twice = next((name for name, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{where}: label {twice!r} is twice in column {column!r}; give it once")
    return found


def _name(item: object, column: str, where: str, declared: tuple[str, ...] | None) -> str:
    if isinstance(item, (bool, list, dict)) or (isinstance(item, float) and not item.is_integer()):
        raise UserError(f"{where}: label {item!r:.60} in column {column!r}; a label is a string or a whole number")
    return label_of(item, column, where, declared)


def set_names(training: SetExamples) -> tuple[str, ...]:
    """Names of the labels in the order of their ids: as declared, else numeric or alphabetical.

    Raises:
        UserError: there are fewer than two, or most of them occur only once.
    """
    counts = Counter(name for labels in training.sets for name in labels)
    names = training.names if training.names is not None else sorted_names(counts)
    if len(names) < 2 or not counts:
        shown = f"only {names[0]!r}" if len(names) == 1 else "none"
        raise UserError(
            f"{training.path}: of labels it has {shown}; give at least two, or set labelled.label and "
            "labelled.separator"
        )
    single = sum(count == 1 for count in counts.values())
    if training.names is None and len(training) >= FEW_EXAMPLES and single > len(training) / 2:
        raise UserError(
            f"{training.path}: {single:,} labels of its {len(training):,} examples occur once; set labelled.label to "
            "the column of the labels, and labelled.separator"
        )
    return names


def set_matrix(examples: SetExamples, names: Sequence[str]) -> NDArray[np.bool_]:
    """Which labels each example has, [N, L].

    Raises:
        UserError: a label that is not among `names`.
    """
    ids = {name: number for number, name in enumerate(names)}
    matrix = np.zeros((len(examples), len(names)), dtype=np.bool_)
    for index, labels in enumerate(examples.sets):
        for name in labels:
            if name not in ids:
                shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                raise UserError(
                    f"{examples.place(index)}: label {name!r} is not among the training examples ({shown}); correct it "
                    "or add training examples of it"
                )
            matrix[index, ids[name]] = True
    return matrix


def split_sets(training: SetExamples, labelled: LabelledConfig, seed: int) -> tuple[SetExamples, SetExamples]:
    """Training examples and those of them that are held out for validation, both with the names of all labels.

    Raises:
        UserError: too few examples to hold any out, or labels that `set_names` refuses.
    """
    training = replace(training, names=set_names(training))  # a rare label may be in the tenth alone
    kept, held = (_select(training, part) for part in held_out(labelled, [""] * len(training), seed))
    return kept, held


def _select(examples: SetExamples, indices: Sequence[int]) -> SetExamples:
    chosen = select(examples, indices)
    assert isinstance(chosen, SetExamples)
    return replace(chosen, sets=[examples.sets[index] for index in indices])
