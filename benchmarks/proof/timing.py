"""Fair timing on a GPU: rivals in turn, each run between two events of the stream; on a CPU by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.common import Timing

Work = Callable[[], object]
#: bytes written between runs, more than the caches of a GPU hold, so that no rival finds its data there
FLUSH = 256 << 20


def milliseconds(work: Work, device: torch.device, flush: torch.Tensor | None) -> float:
    """Of one run; on a GPU from its first kernel to its last."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush.zero_()
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


def timed(
    rivals: Mapping[str, Work], device: torch.device, repeats: int = 20
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Runs of each rival in turn, after three that aren't measured; and why any was left out.

    A rival that raises is left out with its error's first line: a library that doesn't work here ends nobody else.
    """
    able: dict[str, Work] = {}
    faults: dict[str, str] = {}
    for name, work in rivals.items():
        try:
            for _ in range(3):
                work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            able[name] = work
        except Exception as error:
            faults[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device) if device.type == "cuda" else None
    runs: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(repeats):
        for name, work in able.items():
            runs[name].append(milliseconds(work, device, flush))
    return {name: Timing(values) for name, values in runs.items()}, faults


def table(
    title: str, rivals: Mapping[str, Work], device: torch.device, repeats: int = 20, moved: float | None = None
) -> dict[str, Any]:
    """A row: milliseconds, spread and times the first rival's time, which is ours.

    Args:
        moved: bytes that the work must move at least; ours then also tells GB/s.
    """
    times, faults = timed(rivals, device, repeats)
    ours = next(iter(rivals))
    found: dict[str, dict[str, Any]] = {}
    for name, timing in times.items():
        found[name] = timing.to_dict()
        if ours in times:
            found[name]["x ours"] = timing.median / times[ours].median
        if moved is not None:
            found[name]["GB/s of the least bytes"] = moved / timing.median / 1e6
    return {"title": title, "rivals": found | {name: {"left out": why} for name, why in faults.items()}}


def extra_bytes(work: Work, device: torch.device) -> int:
    """The most that torch's allocator gave out during a run beyond what it had before; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated(device)) - before
