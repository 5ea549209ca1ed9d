"""Batching by length, as pure functions.

Attention may work on a padded grid as wide as its longest sequence, so sequences of similar length should share a
micro-batch. Within a global batch, samples are assigned to ranks and micro-batches by length (`deal`); that doesn't
change which samples are in it. That depends on the order of the epoch alone; `grouped_order` gives one in which samples
of similar length share a global batch.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from engine.data.loading.source import Indices

#: global batches whose samples are sorted by length together, as in transformers' LengthGroupedSampler
WINDOW = 50
#: windows in an epoch, at least: with fewer, the same samples would share a global batch in every epoch
WINDOWS = 4


@runtime_checkable
class KnowsLengths(Protocol):
    """A `SampleSource` that can tell how long its samples are before they are made."""

    def lengths(self, epoch: int, indices: Indices) -> Indices:
        """Length in tokens of each of these samples of the epoch, int64 [B]."""
        ...


def longest_first(lengths: Indices) -> Indices:
    """Indices [N] that sort samples by falling length; samples of the same length keep their order."""
    return np.argsort(-lengths, kind="stable")


def deal(lengths: Indices, micro_batch: int, world_size: int) -> Indices:
    """Assign the samples of a global batch to the A micro-batches (gradient accumulation) of each rank.

    Samples of similar length share a micro-batch, the longest come first (a run that will not fit in memory
    fails at once), and in each forward pass the tokens of two ranks differ by no more than two of its samples do.

    Args:
        lengths: tokens of each sample, [A x world_size x micro_batch].
        micro_batch: samples of a rank in a forward pass.
        world_size: number of ranks.

    Returns:
        Indices into the global batch, [A, world_size, micro_batch], ascending in each micro-batch: one rank without
        gradient accumulation takes the global batch in its own order.
    """
    rows = longest_first(lengths).reshape(-1, micro_batch, world_size).copy()
    # Each row holds one sample per rank, longest first; every other row is reversed, or rank 0 would have most tokens.
    rows[:, 1::2] = rows[:, 1::2, ::-1]
    return np.sort(rows.transpose(0, 2, 1), axis=2)


def grouped_order(
    shuffled: Indices, lengths: Indices, batch: int, begun: int, generator: np.random.Generator
) -> Indices:
    """An epoch's order in which samples of similar length share a global batch, the global batches shuffled.

    Args:
        shuffled: the samples' numbers in random order, int64 [N]; it breaks ties, and only samples of the same window
            of `WINDOW` global batches may share one.
        lengths: tokens of each sample, by its number, [N].
        batch: samples of a global batch.
        begun: samples at the start of the epoch that complete a global batch begun in the epoch before. They keep
            their places, as do those after the last whole global batch.
        generator: shuffles the global batches.
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
