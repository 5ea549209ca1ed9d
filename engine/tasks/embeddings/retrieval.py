"""Scores of retrieval: where the positives of a text come among all candidates of a split, by cosine.

Shapes: S sequences of a split, T different texts that ask, D candidates (different positives and negatives), P pairs of
a text and a positive of it, H width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.data.labelled.pairs import POSITIVE, TEXT

#: ranks that count
DEPTH = 10
#: cosines that are in memory at once
COSINES = 2**24


@dataclass(frozen=True)
class Ranks:
    """Where each positive of each text came."""

    numbers: NDArray[np.int64]
    """of the texts, ascending, [T]"""
    text: NDArray[np.int64]
    """which of them each pair is of, from 0, ascending, [P]"""
    rank: NDArray[np.int64]
    """of the positive among all candidates, from 1, [P]"""
    candidates: int

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Of each text [T]: MRR@10, nDCG@10, recall@1 and recall@10."""
        relevant = np.bincount(self.text)
        found = self.rank <= DEPTH
        first = np.full(len(relevant), np.iinfo(np.int64).max)
        np.minimum.at(first, self.text, self.rank)
        discounts = 1.0 / np.log2(np.arange(DEPTH) + 2.0)
        gain = np.bincount(self.text, np.where(found, discounts[np.minimum(self.rank, DEPTH) - 1], 0.0))
        return {
            "mrr_at_10": np.where(first <= DEPTH, 1.0 / first, 0.0),
            "ndcg_at_10": gain / discounts.cumsum()[np.minimum(relevant, DEPTH) - 1],
            "recall_at_1": np.bincount(self.text, self.rank <= 1) / relevant,
            "recall_at_10": np.bincount(self.text, found) / relevant,
        }


def ranks(vectors: NDArray[np.float32], member: NDArray[np.int64], text: NDArray[np.int64]) -> Ranks:
    """The rank of every positive of every text, in blocks of `COSINES`.

    Texts with the same number are one: its positives are those of all of its examples. A text is no candidate for
    itself, unless it is its own positive. Of candidates that are equally near the one of the lower number comes first.

    Args:
        vectors: [S, H], of any length.
        member, text: of each sequence, see `engine.data.labelled.pairs.PairSource`, [S].
    """
    asking, asking_rows = np.unique(text[member == TEXT], return_index=True)
    numbers, rows = np.unique(text[member != TEXT], return_index=True)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    queries, candidates = unit[member == TEXT][asking_rows], unit[member != TEXT][rows]
    both = np.unique(np.stack((text[member == TEXT], text[member == POSITIVE]), axis=1), axis=0)
    of_text, of_candidate = np.searchsorted(asking, both[:, 0]), np.searchsorted(numbers, both[:, 1])
    found = np.empty(len(both), dtype=np.int64)
    step = max(1, COSINES // len(numbers))
    for start in range(0, len(both), step):
        own, right = of_text[start : start + step], of_candidate[start : start + step]
        cosines = queries[own] @ candidates.T
        itself = numbers == asking[own][:, None]
        itself[np.arange(len(own)), right] = False
        cosines[itself] = -np.inf
        # what is no number is near to nothing, and everything comes before it
        wanted = cosines[np.arange(len(own)), right][:, None]
        before = ~(cosines <= wanted) | ((cosines == wanted) & (np.arange(len(numbers)) < right[:, None]))
        found[start : start + step] = 1 + before.sum(axis=1)
    return Ranks(asking, of_text, found, len(numbers))
