"""Examples that are several sequences each: a question with its options, a text with its positive and negatives.

Shapes: N examples, S sequences of all of them, B and s those of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from engine.data.labelled.encoded import EncodedSource, EncodedTexts
from engine.data.loading.source import Indices


class GroupedSource(EncodedSource):
    """Encoded examples of several sequences each, which lie one after the other in a batch."""

    def __init__(
        self,
        encoded: EncodedTexts,
        counts: Sequence[int],
        seed: int,
        fixed: bool = False,
        group: int | None = None,
        members: Indices | None = None,
    ) -> None:
        """
        Args:
            encoded: the texts that sequences are.
            counts: sequences of each example, [N].
            members: which encoded text each sequence is, [S], so that a text of several examples is kept once; None:
                the texts are the sequences, in their order.
        """
        super().__init__(encoded, seed, fixed, group)
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.members = np.arange(self.first[-1]) if members is None else members
        assert len(self.members) == self.first[-1]

    @property
    def count(self) -> int:
        """Examples."""
        return len(self.first) - 1

    @cached_property
    def counts(self) -> Indices:
        """Sequences of each example, [N]."""
        return np.diff(self.first)

    @cached_property
    def sizes(self) -> Indices:
        """Tokens of all sequences of each example, int64 [N]."""
        lengths = np.diff(self.encoded.offsets)[self.members]
        sizes: Indices = np.diff(np.concatenate([[0], np.cumsum(lengths)])[self.first])
        return sizes

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        return {"sequences": float(self.counts[self._places(epoch, indices)].sum())}

    def sequences(self, examples: Indices) -> Indices:
        """Which encoded texts are the sequences of these examples, in order, [s]."""
        return self.members[np.repeat(self.first[examples], self.counts[examples]) + self.places(examples)]

    def places(self, examples: Indices) -> Indices:
        """The place of each sequence of these examples among those of its own, from 0, [s]."""
        counts = self.counts[examples]
        places: Indices = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return places
