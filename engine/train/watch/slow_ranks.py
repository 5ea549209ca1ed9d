"""Finds ranks that hold the others up, by comparing the ranks' own times, which contain no waiting for each other.

A rank's own time is that of loading its micro-batches and of their forward passes. The backward pass is left out,
because it waits for the reduction of gradients. At ZeRO stage 3 the forward pass waits too, for gathered parameters,
so there a slow device is hidden and only slow loading shows, as where a task looks ahead at all ranks (`Task.ahead`).
On a GPU it is measured by events of the device.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

#: points of the curves in a row at which a rank must be slow to be named
POINTS = 3


class SlowRanks:
    """Measures this rank's own time, and judges those of all ranks."""

    def __init__(self, factor: float | None, device: torch.device) -> None:
        """
        Args:
            factor: how many times the median own time counts as slow; None never names a rank.
            device: the rank's device.
        """
        self.factor, self._device = factor, device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._streaks: dict[int, int] = {}
        self._told: set[int] = set()

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """What happens inside counts as this rank's own time."""
        start = time.perf_counter()
        if self._device.type != "cuda":
            yield
            self._seconds += time.perf_counter() - start
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._events.append((before, after))

    def seconds(self) -> float:
        """This rank's own time in seconds since the last call; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(before.elapsed_time(after) for before, after in self._events) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds

    def judge(self, times: Sequence[float]) -> list[int]:
        """Ranks that have been slow at this point and the last ones, and haven't been named before.

        Args:
            times: own time per step in seconds, by rank; of two middle values the median is the lower one.
        """
        if self.factor is None:
            return []
        limit = self.factor * statistics.median_low(times)
        slow = {rank for rank, seconds in enumerate(times) if seconds > limit > 0}
        self._streaks = {rank: self._streaks.get(rank, 0) + 1 for rank in slow}
        late = sorted(rank for rank, streak in self._streaks.items() if streak >= POINTS and rank not in self._told)
        self._told.update(late)
        return late

    @staticmethod
    def tell(rank: int, times: Sequence[float], host: str) -> str:
        """The line that names a slow rank."""
        median = statistics.median_low(times)
        return (
            f"slow rank: rank {rank} on {host} needs {times[rank] / median:.1f} times the ranks' median for its own "
            f"loading and forward passes ({times[rank]:.3g} s a step against {median:.3g} s), {POINTS} points in a row"
        )
