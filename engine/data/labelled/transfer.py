"""Texts without labels beside labelled examples, to be learned from teachers alone.

Shapes: N labelled examples, U texts without a label, B examples of a batch.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.labelled.encoded import EncodedTexts, LabelledSource
from engine.data.labelled.files import Examples, read_with
from engine.data.labelled.tables import Columns
from engine.data.loading.source import Indices


def read_texts(path: str, text: str, text_pair: str | None) -> Examples:
    """Read texts or pairs, whose labels are empty whatever the file holds; see `read_examples`.

    Raises:
        UserError: as of `read_examples`.
    """
    return read_with(path, Columns(text, text_pair, ""), lambda record, where, names: "")


class TransferSource(LabelledSource):
    """Labelled examples, and behind them texts without, in an epoch's order of all of them.

    A batch also carries `known`, bool [B]: whether the example has a label. The others' `labels` mean nothing.
    """

    def __init__(self, labelled: LabelledSource, texts: EncodedTexts) -> None:
        own, count = labelled.encoded, len(texts.offsets) - 1
        self._texts = texts
        encoded = EncodedTexts(
            np.concatenate((own.tokens, texts.tokens)),
            np.concatenate((own.offsets, own.offsets[-1] + texts.offsets[1:])),
            np.concatenate((own.first_lengths, texts.first_lengths)),
            np.concatenate((own.full_lengths, texts.full_lengths)),
        )
        labels = np.concatenate((labelled.labels, np.zeros((count, *labelled.labels.shape[1:]), labelled.labels.dtype)))
        weights = None
        if labelled.weights is not None:
            weights = np.concatenate((labelled.weights, np.zeros(count, dtype=np.float32)))
        super().__init__(encoded, labels, labelled.seed, group=labelled.group, weights=weights)
        self.known = np.arange(self.count) < labelled.count

    @cached_property
    def texts_fingerprint(self) -> str:
        """That of the texts without labels alone, whichever labelled examples a seed drew."""
        nothing = np.zeros(len(self._texts.offsets) - 1)
        return LabelledSource(self._texts, nothing, self.seed).fingerprint

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        """Those of `LabelledSource`, and known: examples with a label."""
        return super().totals(epoch, indices) | {"known": float(self.known[self._places(epoch, indices)].sum())}

    def targets(self, examples: Indices) -> dict[str, NDArray[Any]]:
        """labels [B] (of several labels [B, L]) and known [B]."""
        return super().targets(examples) | {"known": self.known[examples]}
