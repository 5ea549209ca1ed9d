"""Memory of a rank: how much there is, whether a failure means that it ran out, and whether a micro-batch fits."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path

import numpy as np
import torch

from engine.config import Precision
from engine.data.source import Cursor, MicroBatch, SampleSource
from engine.tasks.task import Task

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: samples among which the longest sequence is looked for
SEARCHED = 2048
#: how torch's CPU allocator and CUDA's say it, where they raise a plain RuntimeError
PHRASES = ("can't allocate memory", "out of memory", "cannot allocate memory")
#: options of glibc's mallopt
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: the largest that malloc's own adaption of its mmap threshold reaches, and more than a heap's end will ever be free
MAPPED_FROM, TRIMMED_FROM = 32 << 20, (1 << 31) - 1


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


def release_freed() -> None:
    """Return to the system what malloc keeps of memory that was freed, where the C library can (glibc)."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_heap() -> None:
    """Let malloc (glibc) keep the end of its heap that a step has freed, unless the environment sets its thresholds.

    Each step would return it and get it again, cleared page by page: 2 % of a step of BERT-base on 2 CPU threads. The
    peak stays what it was. Larger chunks than 32 MB are still mapped on their own: in the heap they would leave gaps.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
        mallopt(M_TRIM_THRESHOLD, TRIMMED_FROM)


def share_with_forks() -> None:
    """Prepare for processes that are forked from here and live on: they share pages until somebody writes to them.

    Freed memory would be used again here and stay there, and the garbage collector marks every object that it looks at.
    From now on it leaves alone those that are there.
    """
    release_freed()
    gc.freeze()


def forget_peak(device: torch.device) -> None:
    """Give cached memory back and start the rank's peak anew; on Linux and GPUs only."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    release_freed()
    with contextlib.suppress(OSError):  # Linux alone has it
        Path("/proc/self/clear_refs").write_text("5")


def _pass(task: Task, micro_batch: int, precision: Precision, device: torch.device, ballast: int) -> None:
    """One forward and backward pass; all that it took is free again when it returns."""
    held = torch.empty(ballast, dtype=torch.uint8, device=device)
    model = task.build_model().to(device=device, dtype=TYPES[precision]).train()
    batch = longest_batch(task.train_source(), micro_batch)
    batch.max_length = int(batch.inputs["lengths"].max())
    batch.inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    task.step(model, batch).loss.backward()
    del held
