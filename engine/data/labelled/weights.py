"""What an example of each class, or a word of each tag, counts in training. Shapes: C classes."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from engine.data.loading.source import Indices
from engine.errors import UserError

BALANCED = "balanced"


def class_weights(
    given: str, names: Sequence[str], ids: Indices, groups: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> NDArray[np.float32]:
    """The weight of each class, [C].

    Args:
        given: "balanced", by which all classes count alike (scikit-learn's rule: examples / (classes x the class's
            examples); a class without examples weighs 1), or "name=weight,..."; quotes keep a comma in a name. Classes
            that aren't named weigh 1.
        names: of the classes, in the order of their ids.
        ids: class ids of the training examples.
        groups: names that stand for several classes each, where no class is called so.

    Raises:
        UserError: names the part of labelled.class_weights that is wrong.
    """
    if given == BALANCED:
        counts = np.bincount(ids, minlength=len(names))
        balanced = len(ids) / (len(names) * np.maximum(counts, 1))
        return np.where(counts > 0, balanced, 1.0).astype(np.float32)
    weights = dict.fromkeys(names, 1.0)
    seen: set[str] = set()
    for part in next(csv.reader([given], skipinitialspace=True), []):
        name, equals, value = (piece.strip() for piece in part.rpartition("="))
        if not equals:
            raise _refused(given, f"{part!r} is no name=weight; give balanced, or such as {names[0]}=2,{names[1]}=0.5")
        chosen = [name] if name in weights else groups.get(name, ())
        if not chosen:
            known = [*groups, *names]
            shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            raise _refused(given, f"{name!r} is not among the classes of labelled.train ({shown})")
        if twice := seen.intersection(chosen):
            raise _refused(given, f"{min(twice)!r} has two weights; give one")
        seen.update(chosen)
        weights |= dict.fromkeys(chosen, _weight(given, name, value))
    if not seen:
        raise _refused(given, "it names no class; give balanced, such as yes=2,no=0.5, or null")
    return np.array(list(weights.values()), dtype=np.float32)


def _weight(given: str, name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0.0 < weight < math.inf:
        raise _refused(given, f"the weight of {name!r} is {text!r}; give a number above 0")
    return weight


def _refused(given: str, why: str) -> UserError:
    return UserError(f"labelled.class_weights: {given!r} is not allowed; {why}")
