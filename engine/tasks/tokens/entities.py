"""Entities that BIO tags tell, and the scores of predicted ones.

Shapes: W words of all texts, end to end; E entities; T types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: ids of tags: O is 0, and of type t B- is 2 t + 1 and I- is 2 t + 2; see `engine.data.labelled.tagged.files.tag_names`
Tags = NDArray[np.int64]
Entities = NDArray[np.int64]


def entities(tags: Tags, begins: NDArray[np.bool_]) -> Entities:
    """The entities of a sequence of tags, [E, 3] of the first word, the one behind the last, and the type.

    Strict: an entity begins with B- and goes on with every I- of its type; an I- that follows no such tag is no part of
    any (seqeval's strict mode with IOB2).

    >>> entities(np.array([1, 2, 0, 4, 3, 2]), np.array([True, False, False, False, False, False])).tolist()
    [[0, 2, 0], [4, 5, 1]]

    Args:
        tags: [W], their ids.
        begins: [W], whether a word is the first of its text.
    """
    before = np.concatenate([[0], tags[:-1]])
    kinds = (tags - 1) // 2
    goes_on = (tags > 0) & (tags % 2 == 0) & (before > 0) & (kinds == (before - 1) // 2) & ~begins
    first = np.flatnonzero(tags % 2 == 1)
    breaks = np.append(np.flatnonzero(~goes_on), len(tags))
    behind = breaks[np.searchsorted(breaks, first, "right")]
    return np.stack([first, behind, kinds[first]], axis=1)


@dataclass(frozen=True)
class EntityCounts:
    """By type, [T]."""

    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    right: NDArray[np.int64]
    """predicted with the same words and type as a true one"""

    def scores(self, kind: int | None = None) -> dict[str, Any]:
        """Precision, recall, F1 and support of a type, or of all entities (micro average); 0 where nothing divides."""
        chosen = slice(None) if kind is None else slice(kind, kind + 1)
        true, predicted, right = (int(counts[chosen].sum()) for counts in (self.true, self.predicted, self.right))
        return {
            "precision": right / predicted if predicted else 0.0,
            "recall": right / true if true else 0.0,
            "f1": 2.0 * right / (true + predicted) if true + predicted else 0.0,
            "support": true,
        }


def count_entities(true: Entities, predicted: Entities, types: int) -> EntityCounts:
    """Compare entities exactly.

    Args:
        true, predicted: see `entities`.
        types: T.
    """
    rows = {tuple(row) for row in true.tolist()}
    right = np.array([row[2] for row in predicted.tolist() if tuple(row) in rows], dtype=np.int64)
    kinds = (true[:, 2], predicted[:, 2], right)
    return EntityCounts(*(np.bincount(each, minlength=types) for each in kinds))
