"""Micro-batches of a rank from any `SampleSource`: exact, resumable, and the same samples at every world size.

Global batch k is the next `global_batch` samples of the endless stream of epochs. Its samples are dealt to the ranks
and their micro-batches by length (`engine.data.loading.lengths.deal`), or in contiguous parts where the source doesn't
know lengths. So neither the number of ranks nor gradient accumulation changes which samples an optimizer step sees, and
nothing is dropped or repeated at the end of an epoch.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from engine.config.train import largest_divisor
from engine.data.loading.lengths import KnowsLengths, deal, longest_first
from engine.data.loading.processes import (
    LoaderContext,
    end_workers,
    kill_workers,
    start_iterator,
    worker_preparation,
)
from engine.data.loading.source import Cursor, Indices, MicroBatch, SampleSource
from engine.errors import RunError, UserError

#: sequences of a micro-batch, at most, where the user leaves its size open: on CPUs, and on GPUs by their tokens
CPU_SEQUENCES, GPU_TOKENS = 32, 16_384
#: seconds without a micro-batch after which the loader processes are started again; doubled at each restart in a row
PATIENCE = 30.0
ATTEMPTS = 4


@dataclass(frozen=True)
class Default:
    """The micro-batch of a rank where the user leaves it open: the largest divisor of its share up to a limit."""

    limit: int
    """sequences"""
    reason: str
    """in a sentence"""


CPU_DEFAULT = Default(CPU_SEQUENCES, f"the largest that divides a rank's share, up to {CPU_SEQUENCES}")


def default_micro_batch(accelerator: str, sequence_length: int, sequences: int = 1) -> Default:
    """The default of an accelerator ("cuda", "cpu", ...) for samples of so many sequences of so many tokens at most.

    A GPU waits for its host's launches where a pass has few tokens.
    """
    each = f" x {sequences}" if sequences > 1 else ""
    if accelerator == "cpu":
        limit = max(1, CPU_SEQUENCES // sequences)
        told = f"{limit}{each} sequences" if each else f"{limit}"
        return Default(limit, f"the largest that divides a rank's share, up to {told}")
    limit = -(-GPU_TOKENS // (sequence_length * sequences))
    tokens = f"{limit}{each} x {sequence_length} = {limit * sequences * sequence_length:,} tokens"
    return Default(limit, f"the largest that divides a rank's share, up to {tokens}")


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is divided over ranks and gradient accumulation.

    Raises:
        UserError: the global batch is no multiple of micro_batch x world_size.
    """

    global_batch: int
    """samples of an optimizer step, over all ranks"""
    micro_batch: int
    """samples of a rank in a forward pass"""
    rank: int = 0
    world_size: int = 1
    reason: str = field(default="train.micro_batch", compare=False)
    """why this micro-batch, in a sentence or as the option that says it"""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        _require_multiple(
            self.global_batch,
            self.micro_batch * self.world_size,
            f"train.micro_batch {self.micro_batch} x {self.world_size} rank(s)",
        )

    @property
    def accumulation(self) -> int:
        """Gradient accumulation: micro-batches of a rank in an optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)


def resolve_layout(
    global_batch: int, micro_batch: int | None, world_size: int, rank: int = 0, default: Default = CPU_DEFAULT
) -> BatchLayout:
    """The layout of a rank; no micro-batch means the default's.

    Raises:
        UserError: the global batch doesn't divide.
    """
    if micro_batch is not None:
        return BatchLayout(global_batch, micro_batch, rank, world_size)
    _require_multiple(global_batch, world_size, f"{world_size} rank(s)")
    share = global_batch // world_size
    micro_batch = largest_divisor(share, default.limit)
    return BatchLayout(global_batch, micro_batch, rank, world_size, default.reason)


def _require_multiple(global_batch: int, unit: int, meaning: str) -> None:
    if global_batch % unit:
        below = global_batch // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise UserError(f"train.global_batch: {global_batch} is not a multiple of {meaning}; give {nearest}")


@dataclass(frozen=True)
class _Span:
    """Samples `start` to `stop` of an epoch."""

    epoch: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class _Request:
    """A micro-batch before it is collated; small, because it is sent to a loader process."""

    description: Any
    totals: dict[str, float]
    cursor: Cursor


def training_batches(
    source: SampleSource, layout: BatchLayout, cursor: Cursor, workers: int, *, pin: bool = False
) -> Generator[MicroBatch, None, None]:
    """This rank's micro-batches from `cursor` on, without end; `layout.accumulation` of them make a global batch.

    With `workers` processes only `collate` runs there, so the result is the same for any number of them, and also
    when they are started again: a fork may deadlock in the child before its first line of Python (seen with CPython
    3.11, once in some 100 starts). Close the iterator to end the processes.

    They start with the call. Make it before the model: a fork keeps its own copy of all that the trainer later changes.

    Args:
        pin: put the tensors into page-locked memory, for a GPU.

    Raises:
        UserError: the source ends before the cursor.
        RunError: the processes gave no sign of life, several times.
    """
    _check_cursor(source, cursor)
    start = partial(_start, source, layout, cursor, workers, pin)
    return _restarted(start(PATIENCE, 0), start, workers)


def _check_cursor(source: SampleSource, cursor: Cursor) -> None:
    size = source.epoch_size(cursor.epoch)
    if cursor.offset >= size:
        raise UserError(
            f"data: {size} samples are in epoch {cursor.epoch} and the run goes on after {cursor.offset} of them, so "
            "it began with other data; give that data, or start anew in another output folder"
        )


@dataclass(frozen=True)
class _Loading:
    """A running set of loader processes, and the function that ends them."""

    iterator: Any
    end: Callable[[], None]

    def items(self) -> Generator[MicroBatch, None, None]:
        try:
            yield from _items(self.iterator)
        finally:
            self.end()
            atexit.unregister(self.end)


def _restarted(
    loading: _Loading, start: Callable[[float, int], _Loading], workers: int
) -> Generator[MicroBatch, None, None]:
    """Micro-batches of `loading`, and of the sets of processes that replace it when they hang."""
    done, stuck = 0, 0
    while True:
        before, patience = done, PATIENCE * 2**stuck
        try:
            for batch in loading.items():
                yield batch
                done += 1
        except _StuckLoader:
            stuck = stuck + 1 if done == before else 1
            if stuck == ATTEMPTS:
                raise RunError(
                    f"the data.workers ({workers}) gave no micro-batch, at last for {patience:g} s; set data.workers "
                    "0, or look for a slow disk"
                ) from None
            loading = start(PATIENCE * 2**stuck, done)


class _StuckLoader(Exception):  # noqa: N818 - another attempt follows
    """Loader processes gave no micro-batch for too long."""


def _start(
    source: SampleSource, layout: BatchLayout, cursor: Cursor, workers: int, pin: bool, patience: float, skip: int
) -> _Loading:
    """Begin to load the micro-batches after the first `skip` ones from `cursor`."""
    loader: DataLoader[Any] = DataLoader(
        _Collation(source),
        batch_size=None,
        sampler=islice(_requests(source, layout, cursor), skip, None),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=worker_preparation(),
        multiprocessing_context=LoaderContext() if workers else None,
        timeout=patience if workers else 0,
        pin_memory=pin,
        # Without its own generator a DataLoader draws from torch's global one, whose state a resume restores exactly.
        generator=torch.Generator(),
    )
    iterator = start_iterator(loader)
    end = partial(end_workers, weakref.ref(iterator))
    atexit.register(end)
    return _Loading(iterator, end)


def _items(iterator: Iterator[Any]) -> Iterator[MicroBatch]:
    """What the loader processes send, as micro-batches or as the error that they met."""
    while True:
        try:
            item = next(iterator)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            kill_workers(iterator)
            raise _StuckLoader from error
        if isinstance(item, UserError):
            raise item
        yield item.micro_batch() if isinstance(item, _Parts) else item


def evaluation_batches(
    source: SampleSource, rank: int, world_size: int, micro_batch: int, limit: int
) -> Iterator[MicroBatch]:
    """This rank's share of the first `limit` samples of epoch 0 (0: all), in micro-batches dealt to the ranks in turn.

    Micro-batches are made in falling length where the source knows lengths. All ranks take equally many; one with too
    few repeats the first as a dummy. Totals are those of the whole evaluated set.
    """
    size = source.epoch_size(0)
    count = min(limit, size) if limit else size
    assert count > 0, "an evaluation needs samples"
    whole = [_Span(0, 0, count)]
    lengths = _lengths(source, whole)
    order = np.arange(count) if lengths is None else longest_first(lengths)
    chunks = [np.sort(order[start : start + micro_batch]) for start in range(0, count, micro_batch)]
    totals = _totals(source, whole)
    after = Cursor(0, count, count)
    for index in range(rank, -(-len(chunks) // world_size) * world_size, world_size):
        dummy = index >= len(chunks)
        inputs = source.collate(source.describe(0, chunks[0 if dummy else index]))
        yield MicroBatch(inputs, totals, after, dummy)


def _requests(source: SampleSource, layout: BatchLayout, cursor: Cursor) -> Iterator[_Request]:
    """Descriptions of this rank's micro-batches, one global batch after the other, without end."""
    while True:
        spans, cursor = _advance(source, cursor, layout.global_batch)
        totals = _totals(source, spans)
        for places in _places(_lengths(source, spans), layout):
            yield _Request(_describe(source, spans, places), totals, cursor)


def _places(lengths: Indices | None, layout: BatchLayout) -> Indices:
    """Indices into the global batch of the samples of this rank's micro-batches, [accumulation, micro_batch]."""
    if lengths is not None:
        return deal(lengths, layout.micro_batch, layout.world_size)[:, layout.rank]
    parts = np.arange(layout.global_batch).reshape(layout.world_size, layout.accumulation, layout.micro_batch)
    own: Indices = parts[layout.rank]
    return own


def _advance(source: SampleSource, cursor: Cursor, count: int) -> tuple[list[_Span], Cursor]:
    """The next `count` samples of the endless stream of epochs, and the position after them."""
    spans, epoch, start, left = [], cursor.epoch, cursor.offset, count
    while left:
        size = source.epoch_size(epoch)
        assert start < size, f"offset {start} lies beyond the {size} samples of epoch {epoch}"
        spans.append(_Span(epoch, start, min(size, start + left)))
        left -= len(spans[-1])
        epoch, start = (epoch + 1, 0) if spans[-1].stop == size else (epoch, spans[-1].stop)
    return spans, Cursor(epoch, start, cursor.consumed + count)


def _lengths(source: SampleSource, spans: list[_Span]) -> Indices | None:
    """Length in tokens of each sample of consecutive spans, if the source knows it."""
    if not isinstance(source, KnowsLengths):
        return None
    return np.concatenate([source.lengths(span.epoch, np.arange(span.start, span.stop)) for span in spans])


def _describe(source: SampleSource, spans: list[_Span], places: Indices) -> Any:
    """Descriptions of the samples at ascending indices into consecutive spans."""
    descriptions, before = [], 0
    for span in spans:
        first, last = np.searchsorted(places, (before, before + len(span)))
        if first < last:
            descriptions.append(source.describe(span.epoch, places[first:last] - before + span.start))
        before += len(span)
    return descriptions[0] if len(descriptions) == 1 else source.join(descriptions)


def _totals(source: SampleSource, spans: list[_Span]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for span in spans:
        for name, value in source.totals(span.epoch, np.arange(span.start, span.stop)).items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


@dataclass(frozen=True)
class _Parts:
    """A micro-batch on its way from a loader process.

    Arrays go through the pipe by value. Tensors would go through shared memory, one file per tensor: measured for 32
    sequences of 128 tokens, that costs the training process 0.7 ms per micro-batch instead of 0.06.
    """

    arrays: dict[str, NDArray[Any]]
    totals: dict[str, float]
    cursor: Cursor

    def pin_memory(self) -> MicroBatch:
        """What the loader's thread calls where there is a GPU."""
        batch = self.micro_batch()
        return replace(batch, inputs={name: tensor.pin_memory() for name, tensor in batch.inputs.items()})

    def micro_batch(self) -> MicroBatch:
        tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        return MicroBatch(tensors, self.totals, self.cursor)


class _Collation(Dataset[Any]):
    """The data set of a loader process: it turns a request into the arrays of a micro-batch."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def __getitem__(self, request: _Request) -> _Parts | UserError:
        try:
            inputs = self._source.collate(request.description)
        except UserError as error:
            # Raised in a loader process it would come back with that process's traceback in its message.
            return error
        return _Parts({name: tensor.numpy() for name, tensor in inputs.items()}, request.totals, request.cursor)


def _unchanged(item: Any) -> Any:
    return item
