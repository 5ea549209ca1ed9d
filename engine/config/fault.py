"""What a run does when it is interrupted, hangs, or its numbers go wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from engine.errors import require

NonFinitePolicy = Literal["stop", "skip", "rollback"]
SpikePolicy = Literal["ignore", "skip", "rollback"]


@dataclass
class FaultConfig:
    """Stops, hangs, slow ranks, losses and gradients that are no numbers, loss spikes, and restarts."""

    check_interval: int | None = None
    """steps between two looks, of all ranks together, at signals and the loss; null: 1 on CPUs, 10 on GPUs, where a
    look waits for the device; with a policy for bad numbers every step is looked at"""
    hang_timeout: float | None = 1800.0
    """seconds without a micro-batch, evaluation batch or save until a rank writes its stacks and exits; null never"""
    slow_rank_factor: float | None = 1.5
    """name a rank that takes this many times the ranks' median for its own loading and forward passes; null never"""
    non_finite: NonFinitePolicy = "stop"
    """for a loss or gradient that is not finite: stop; skip that update; or rollback to the newest checkpoint and leave
    that global batch out (fp16's gradients are DeepSpeed's affair, which skips them and lowers the loss scale)"""
    spike: SpikePolicy = "ignore"
    """for a loss above spike_factor times the median of the last spike_window steps: ignore, skip or rollback"""
    spike_factor: float = 2.0
    """how many times the median loss is a spike"""
    spike_window: int = 100
    """steps whose median loss a spike is measured by; the first 10 steps are never spikes"""
    max_faults: int = 10
    """updates that one start of the run skips or rolls back before it gives up"""
    max_restarts: int | None = None
    """restarts of the output folder with resume auto before it is refused; null: no bound"""
    max_stalled_restarts: int | None = 3
    """starts with resume auto that begin at the same step before the next one is refused; null: no bound"""

    def validate(self) -> None:
        policies = {"non_finite": ("stop", "skip", "rollback"), "spike": ("ignore", "skip", "rollback")}
        for name, allowed in policies.items():
            value = getattr(self, name)
            require(value in allowed, f"fault.{name}", value, f"choose one of {', '.join(allowed)}")
        for name in ("check_interval", "max_restarts", "max_stalled_restarts"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"fault.{name}", value, "give a whole number of at least 1, or null")
        for name in ("spike_window", "max_faults"):
            require(getattr(self, name) >= 1, f"fault.{name}", getattr(self, name), "give a whole number of at least 1")
        timeout, slow = self.hang_timeout, self.slow_rank_factor
        valid = timeout is None or (timeout > 0 and math.isfinite(timeout))
        require(valid, "fault.hang_timeout", timeout, "give a positive number of seconds, or null")
        valid = slow is None or (slow > 1 and math.isfinite(slow))
        require(valid, "fault.slow_rank_factor", slow, "give a number above 1, or null")
        valid = self.spike_factor > 1 and math.isfinite(self.spike_factor)
        require(valid, "fault.spike_factor", self.spike_factor, "give a number above 1")

    @property
    def judges_updates(self) -> bool:
        """Whether the loss must be known before every update."""
        return self.non_finite != "stop" or self.spike != "ignore"
