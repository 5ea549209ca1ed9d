"""Whether a micro-batch fits in memory: how much a rank has, which errors mean that it ran out, and a trial pass."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

import numpy as np
import torch

from engine.config import Precision
from engine.data.loading.lengths import KnowsLengths
from engine.data.loading.source import Cursor, MicroBatch, SampleSource
from engine.precision import DTYPES
from engine.tasks.task import Task
from engine.train.heap import release_freed

#: samples of the data set among which the longest sequence is searched
SEARCHED = 2048
#: messages of torch's CPU allocator and of CUDA that mean out of memory, where they raise a plain RuntimeError
PHRASES = ("can't allocate memory", "out of memory", "cannot allocate memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in PHRASES)


def available_memory(device: torch.device, local_size: int) -> int:
    """Bytes that this rank may still allocate: free on its GPU, or its share of what the machine has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([host_available(), *cgroup_available()]) // local_size


def host_available() -> int:
    """Bytes of host memory that the machine has left without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left of each limit of the control group, which a container or a SLURM job has; empty without a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return [int((root / limit).read_text()) - int((root / used).read_text())]
        except (OSError, ValueError):  # "max" stands for no limit
            continue
    return []


def longest_batch(source: SampleSource, micro_batch: int) -> MicroBatch:
    """A micro-batch of the longest of the source's first samples, repeated: no other takes more memory."""
    searched = np.arange(min(SEARCHED, source.epoch_size(0)))
    if isinstance(source, KnowsLengths):
        longest = int(source.lengths(0, searched).argmax())
    else:
        longest = int(source.collate(source.describe(0, searched))["lengths"].argmax())
    indices = np.full(micro_batch, longest)
    return MicroBatch(source.collate(source.describe(0, indices)), source.totals(0, indices), Cursor())


def fits(task: Task, micro_batch: int, precision: Precision, device: torch.device, ballast: int) -> bool:
    """Whether a forward and backward pass of the longest micro-batch fits in memory; calls no collective.

    The trial uses the plain model, before ZeRO wraps it: a rank that fails alone must not leave the others waiting in
    a collective.

    Args:
        micro_batch: sequences of the forward pass.
        ballast: bytes reserved for what a run holds besides: optimizer states, fp32 weights, buckets.
    """
    try:
        _pass(task, micro_batch, precision, device, ballast)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()
        forget_peak(device)
    return True


def _pass(task: Task, micro_batch: int, precision: Precision, device: torch.device, ballast: int) -> None:
    """One forward and backward pass; all memory that it took is free again when it returns."""
    held = torch.empty(ballast, dtype=torch.uint8, device=device)
    model = task.build_model().to(device=device, dtype=DTYPES[precision]).train()
    task.step(model, longest_batch(task.train_source(), micro_batch).to(device)).loss.backward()
    del held


def forget_peak(device: torch.device) -> None:
    """Release cached memory and reset the rank's peak memory; on Linux and on GPUs only."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    release_freed()
    with contextlib.suppress(OSError):  # only Linux has this file
        Path("/proc/self/clear_refs").write_text("5")
