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
from engine.data.loading.source import Cursor, MicroBatch, SampleSource
from engine.tasks.task import Task

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: samples among which the longest sequence is looked for
SEARCHED = 2048
#: how torch's CPU allocator and CUDA's say it, where they raise a plain RuntimeError
PHRASES = ("can't allocate memory", "out of memory", "cannot allocate memory")
#: options of glibc's mallopt
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
#: malloc's own padding
TOP_PAD = 128 << 10
#: larger than a step's tensors, and more than a heap's end will ever be free
MAPPED_FROM, TRIMMED_FROM = 1 << 30, (1 << 31) - 1
#: addresses that the heap is extended by at once, near the most that an option of mallopt can say
RESERVED = (1 << 31) - (64 << 20)
#: bytes and number of the requests that make malloc extend it
REQUEST, REQUESTS = 32 << 20, 64
#: of madvise
MADV_HUGEPAGE = 14


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
    """Let malloc (glibc) keep what a step has freed, in huge pages, unless the environment sets its thresholds.

    Each step would return large chunks and the end of the heap and get them again, cleared page by page. Without that
    and with fewer pages to look up, steps of BERT-mini take 5 % less time on 2 CPU threads, and some 15 % more memory,
    since the heap has gaps.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
        mallopt(M_TRIM_THRESHOLD, TRIMMED_FROM)
        mallopt(M_TOP_PAD, RESERVED)
        _extend_heap()
        mallopt(M_TOP_PAD, TOP_PAD)
        _advise_huge_pages()


def _extend_heap() -> None:
    """Make malloc ask for more addresses, of which none is touched: they are no memory yet."""
    lib = ctypes.CDLL(None)
    lib.malloc.argtypes, lib.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    lib.free.argtypes, lib.free.restype = [ctypes.c_void_p], None
    lib.sbrk.argtypes, lib.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    before = lib.sbrk(0)
    held: list[int] = []
    while lib.sbrk(0) == before and len(held) < REQUESTS:  # free chunks are used up first
        held.append(lib.malloc(REQUEST))
    for chunk in held:
        lib.free(chunk)


def _advise_huge_pages() -> None:
    """Ask for huge pages in the heap; where the kernel has none, nothing happens."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            advise(begin, end - begin, MADV_HUGEPAGE)


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
    task.step(model, longest_batch(task.train_source(), micro_batch).to(device)).loss.backward()
    del held
