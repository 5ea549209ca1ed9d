"""How long kernels take at least: each the longer of its FLOPs and its bytes (the roofline of Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from launch.forecast.hardware import Hardware
from launch.forecast.kernels.counting import Kernel

#: of the host a kernel, in torch's eager mode: an assumption
LAUNCH_SECONDS = 5e-6
#: Shares of a data sheet's peak and bandwidth that a step's products and passes are assumed to reach. With these two,
#: what others measured of BERT-large on A100 and V100 is met within 5 % (benchmarks.roofline prints each error).
#: The best of products alone reach 87 % on A100 and 80 % on H100 and H200 (Bekman, "Machine Learning Engineering",
#: table of maximum achievable matmul FLOPS), copies 87 % on H100 (Voltage Park and AI at Georgia Tech, vpbenchmarking)
#: and 90 % on A100 (calculon, systems/a100_80g.json), so a step is taken to lose a fifth and a twentieth of that. No
#: figure of Hopper is among them, and flash attention reaches the share on longer sequences alone (Dao 2023, figure 4).
ATTAINABLE_FLOPS, ATTAINABLE_BANDWIDTH = 0.70, 0.85


@dataclass(frozen=True)
class Bound:
    """Kernels on a card."""

    flops: float
    bytes: float
    launches: float
    compute_seconds: float
    """of kernels that FLOPs bound"""
    memory_seconds: float
    """of kernels that bytes bound"""
    launch_seconds: float
    """of the host"""

    @property
    def device_seconds(self) -> float:
        return self.compute_seconds + self.memory_seconds

    @property
    def seconds(self) -> float:
        """The longer of device and host."""
        return max(self.device_seconds, self.launch_seconds)

    @property
    def limit(self) -> str:
        """What takes longest: launches, or of the kernels on the device those that FLOPs bound or those of bytes."""
        if self.launch_seconds > self.device_seconds:
            return "launches"
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else 0.0


def bound(kernels: Iterable[Kernel], card: Hardware, launch_seconds: float = LAUNCH_SECONDS) -> Bound:
    """The bound of kernels one after the other."""
    flops = moved = launches = compute = memory = 0.0
    for kernel in kernels:
        at_peak, at_bandwidth = kernel.flops / card.peak_flops, kernel.bytes / card.memory_bandwidth
        flops, moved, launches = flops + kernel.flops, moved + kernel.bytes, launches + kernel.launches
        if at_peak >= at_bandwidth:
            compute += at_peak
        else:
            memory += at_bandwidth
    return Bound(flops, moved, launches, compute, memory, launches * launch_seconds)


def attainable(card: Hardware) -> Hardware:
    """The card with the rates that a step is assumed to reach."""
    return replace(
        card,
        peak_flops=card.peak_flops * ATTAINABLE_FLOPS,
        memory_bandwidth=card.memory_bandwidth * ATTAINABLE_BANDWIDTH,
    )
