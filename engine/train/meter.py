"""Averages of a training curve's point: right over micro-batches, accumulation, ranks and steps."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from engine import dist


class Meter:
    """Sums shares of the global batches since the last point, with one small collective a point.

    A share is already divided by the global batch's total, so the sum over micro-batches and ranks is the value
    of one global batch, and division by the number of steps gives the mean over steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0
        self._steps = 0
        self._start = time.perf_counter()
        self._outside = 0.0

    @property
    def steps(self) -> int:
        """Optimizer steps since the last point."""
        return self._steps

    def add(self, shares: Mapping[str, Tensor], tokens: int) -> None:
        """Add one micro-batch: its shares and its number of tokens."""
        self._tokens += tokens
        for name, share in shares.items():
            value = share.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def end_step(self) -> None:
        """An optimizer step is done."""
        self._steps += 1

    def exclude(self, seconds: float) -> None:
        """Leave time that was no training (an evaluation, a save) out of the throughput."""
        self._outside += seconds

    def point(self) -> dict[str, float]:
        """Means since the last point, as curves; collective.

        Returns:
            Each share's mean over steps, `tokens_per_second` over all ranks and `step_time` in seconds.
        """
        names = sorted(self._sums)
        local_tokens = torch.tensor([self._tokens], dtype=torch.float64, device=self._device)
        local = torch.cat([torch.stack([self._sums[name] for name in names]), local_tokens])
        *sums, tokens = dist.sum_over_ranks(local).tolist()
        values = dict(zip(names, sums, strict=True))
        elapsed = time.perf_counter() - self._start - self._outside
        means = {name: value / self._steps for name, value in values.items()}
        means |= {"tokens_per_second": tokens / elapsed, "step_time": elapsed / self._steps}
        self._sums, self._tokens, self._steps = {}, 0, 0
        self._outside, self._start = 0.0, time.perf_counter()
        return means
