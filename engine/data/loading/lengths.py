"""Batches by length: attention works on a grid as wide as its longest sequence, so equals should meet. Pure functions.

A global batch stays the set of samples that it is; within it they are dealt to forward passes and ranks by length.
Only the order of an epoch decides which samples are in a global batch; `grouped_order` brings equals together there.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from engine.data.loading.source import Indices

#: batches among whose samples equals are sought, as in transformers' LengthGroupedSampler
WINDOW = 50
#: with fewer windows in an epoch than this, the same samples would meet in every epoch
WINDOWS = 4


@runtime_checkable
class KnowsLengths(Protocol):
    """A `SampleSource` that can tell how long its samples are before they are made."""

    def lengths(self, epoch: int, indices: Indices) -> Indices:
        """Tokens of these samples of the epoch, int64 [B]."""
        ...


def longest_first(lengths: Indices) -> Indices:
    """Places [N] of samples in falling length; equals in their order."""
    return np.argsort(-lengths, kind="stable")


def deal(lengths: Indices, micro_batch: int, world_size: int) -> Indices:
    """Which samples of a global batch each rank takes into each of its A forward passes.

    Samples of similar length share a forward pass, the longest come first (a run that will not fit in memory
    fails at once), and in each pass the tokens of two ranks differ by no more than two of its samples do.

    Args:
        lengths: tokens of each sample, [A x world_size x micro_batch].
        micro_batch: samples of a rank in a forward pass.
        world_size: ranks.

    Returns:
        Places in the global batch [A, world_size, micro_batch], ascending in each micro-batch: nothing else changes
        where there is one rank and one pass.
    """
    rows = longest_first(lengths).reshape(-1, micro_batch, world_size).copy()
    # Each row is one sample for every rank; were all rows dealt from the left, the first rank had most tokens.
    rows[:, 1::2] = rows[:, 1::2, ::-1]
    return np.sort(rows.transpose(0, 2, 1), axis=2)


def grouped_order(
    shuffled: Indices, lengths: Indices, batch: int, begun: int, generator: np.random.Generator
) -> Indices:
    """An epoch's order in which samples of similar length share a batch, the batches shuffled.

    Args:
        shuffled: the samples in random order, int64 [N]; it decides among equals and which samples may meet.
        lengths: tokens of each sample, by its number, [N].
        batch: samples of a global batch.
        begun: samples at the start of the epoch that fill up a batch begun in the epoch before. They keep their
            places, as do those after the last whole batch.
        generator: shuffles the batches.
    """
    body = shuffled[begun : begun + max(0, len(shuffled) - begun) // batch * batch].copy()
    batches = len(body) // batch
    if not batches:
        return shuffled
    window = batch * max(1, min(WINDOW, batches // WINDOWS))
    for start in range(0, len(body), window):
        part = body[start : start + window]
        body[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
    whole = generator.permutation(body.reshape(batches, batch)).ravel()
    return np.concatenate((shuffled[:begun], whole, shuffled[begun + len(body) :]))
