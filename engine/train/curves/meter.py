"""Averages for the points of training curves: exact over micro-batches, gradient accumulation, ranks and steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine import dist


class Meter:
    """Sums shares of the global batches since the last point, with one small collective per point.

    A share is already divided by the global batch's total (its masked tokens or sequences), so the sum over
    micro-batches and ranks is the value of one global batch, and division by the number of steps the mean over steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restore({})

    @property
    def steps(self) -> int:
        """Optimizer steps since the last point, those before a resume included."""
        return self._steps

    @property
    def timed_steps(self) -> int:
        """Those of these steps that this start made; the time of the others is not known."""
        return self._timed_steps

    def state(self) -> dict[str, Any]:
        """The unfinished point for a checkpoint, so that a resume makes the same point; collective.

        Returns:
            Its `steps` and, by rank, the `sums` so far; JSON keeps every bit of them. Empty right after a point.
        """
        if self._steps == 0:
            return {}
        values = torch.stack(list(self._sums.values())).tolist()
        return {"steps": self._steps, "sums": dist.gather_objects(dict(zip(self._sums, values, strict=True)))}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue the point of a checkpoint's `state`, or begin a new one if it is empty.

        Each rank gets its own sums back; with another number of ranks, rank 0 gets the sums of all.
        """
        rank, size = dist.place()
        saved: list[dict[str, float]] = state.get("sums", [])
        if saved and len(saved) != size:
            totals = {name: math.fsum(sums[name] for sums in saved) for name in saved[0]}
            saved = [totals] + [dict.fromkeys(totals, 0.0)] * (size - 1)
        own = saved[rank] if saved else {}
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self._device) for name, value in own.items()
        }
        self._steps: int = state.get("steps", 0)
        self._tokens, self._timed_steps = 0, 0
        self._outside, self._start = 0.0, time.perf_counter()

    def add(self, shares: Mapping[str, Tensor], tokens: int) -> None:
        """Add one micro-batch of this rank: its shares by name, scalar tensors, and its number of tokens."""
        self._tokens += tokens
        for name, share in shares.items():
            value = share.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def end_step(self) -> None:
        """An optimizer step is done."""
        self._steps += 1
        self._timed_steps += 1

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not training (an evaluation, a save), in seconds, from the throughput."""
        self._outside += seconds

    def point(self) -> dict[str, float]:
        """Means since the last point, as curves; collective.

        Returns:
            Each share's mean over steps; of this start's steps `tokens_per_second` over all ranks and `step_time` in
            seconds.
        """
        names = sorted(self._sums)
        local_tokens = torch.tensor([self._tokens], dtype=torch.float64, device=self._device)
        local = torch.cat([torch.stack([self._sums[name] for name in names]), local_tokens])
        *sums, tokens = dist.sum_over_ranks(local).tolist()
        values = dict(zip(names, sums, strict=True))
        elapsed = time.perf_counter() - self._start - self._outside
        means = {name: value / self._steps for name, value in values.items()}
        means |= {"tokens_per_second": tokens / elapsed, "step_time": elapsed / max(1, self._timed_steps)}
        self.restore({})
        return means
