"""Labels that are numbers. Shapes: N examples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.data.labelled.files import Examples
from engine.errors import UserError


def numbers(examples: Examples) -> NDArray[np.float32]:
    """The number of each example, [N].

    Raises:
        UserError: a label that is no finite number.
    """
    return np.array([_number(examples, index) for index in range(len(examples))], dtype=np.float32)


def _number(examples: Examples, index: int) -> float:
    label = examples.labels[index]
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    # fp32 is what the loss computes with, and larger numbers would be infinite there
    if not abs(value) <= float(np.finfo(np.float32).max) or "_" in label:
        raise UserError(f"{examples.place(index)}: label {label!r:.60} is no finite number; correct it")
    return value


def check_spread(examples: Examples, labels: NDArray[np.float32]) -> None:
    """Refuse training examples of which there is nothing to learn.

    Raises:
        UserError: all have the same number.
    """
    if np.ptp(labels) == 0:
        raise UserError(f"{examples.path}: every label is {labels[0]:g}; give different numbers, or set labelled.label")
