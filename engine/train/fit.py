"""Whether a micro-batch fits: how much memory a rank has, what running out of it looks like, and a trial pass."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

import numpy as np
import torch

from engine.config import Precision
from engine.data.loading.source import Cursor, MicroBatch, SampleSource
from engine.precision import DTYPES
from engine.tasks.task import Task
from engine.train.heap import release_freed

#: samples among which the longest sequence is looked for
SEARCHED = 2048
#: how torch's CPU allocator and CUDA's say it, where they raise a plain RuntimeError
PHRASES = ("can't allocate memory", "out of memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in PHRASES)


def available_memory(device: torch.device, local_size: int) -> int:
    """Bytes that this rank may still take: free on its GPU, or its share of what the machine has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([host_available(), *cgroup_available()]) // local_size


def host_available() -> int:
    """Bytes that the machine can still give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that are left of the control group's limit, the one of a container or a SLURM job; empty without one."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return [int((root / limit).read_text()) - int((root / used).read_text())]
        except (OSError, ValueError):  # "max" is no limit
            continue
    return []


def longest_batch(source: SampleSource, micro_batch: int) -> MicroBatch:
    """A micro-batch of the longest of the source's first samples, over and over: no other takes more memory."""
    searched = np.arange(min(SEARCHED, source.epoch_size(0)))
    lengths = source.collate(source.describe(0, searched))["lengths"]
    indices = np.full(micro_batch, int(lengths.argmax()))
    return MicroBatch(source.collate(source.describe(0, indices)), source.totals(0, indices), Cursor())


def fits(task: Task, micro_batch: int, precision: Precision, device: torch.device, ballast: int) -> bool:
    """Whether a forward and backward pass of the longest micro-batch fits beside `ballast` bytes; no collective.

    The trial takes the plain model, before ZeRO has it: a rank that fails alone must not leave the others waiting in
    a collective. Ballast stands for what a run holds besides: optimizer states, fp32 weights, buckets.
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
    """One forward and backward pass; all that it took is free again when it returns."""
    held = torch.empty(ballast, dtype=torch.uint8, device=device)
    model = task.build_model().to(device=device, dtype=DTYPES[precision]).train()
    task.step(model, longest_batch(task.train_source(), micro_batch).to(device)).loss.backward()
    del held


def forget_peak(device: torch.device) -> None:
    """Give cached memory back and start the rank's peak anew; on Linux and GPUs only."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    release_freed()
    with contextlib.suppress(OSError):  # Linux alone has it
        Path("/proc/self/clear_refs").write_text("5")
