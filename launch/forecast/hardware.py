"""The machines of a plan: what the user says about them, or what this machine shows.

A card's rates are bounds (`launch.forecast.gpus`); what a step reaches of them follows from its kernels
(`launch.forecast.kernels`), or is `Hardware.utilisation`. Every plan prints it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from engine.errors import UserError
from launch.forecast.gpus import GPUS, assumed_gpu, detected_gpu, named_gpu

__all__ = ["GIB", "GPUS", "Hardware", "assumed_gpu", "described_hardware", "parse_bytes", "readable", "this_machine"]

GIB = 1 << 30
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": GIB} | {
    f"{letter}{end}": 1024**power for power, letter in enumerate("KMGT", start=1) for end in ("", "IB")
}
#: bytes of memory below and above which an amount is a slip
LEAST, MOST = 1 << 26, 1 << 50
#: share of a CPU's measured matrix product that forward and backward reach: an assumption
CPU_UTILISATION = 0.45


@dataclass(frozen=True)
class Hardware:
    """What the ranks of a run have; bytes and seconds."""

    name: str
    accelerator: str
    """cuda or cpu"""
    ranks: int
    ranks_per_node: int
    memory: int
    """of a rank's device"""
    host_memory: int
    """of a node"""
    peak_flops: float
    """of a rank, in the precision of training"""
    memory_bandwidth: float
    link_bandwidth: float
    """of a rank to the others of its node, one direction"""
    network_bandwidth: float = 25e9
    """of a node to the others, one direction"""
    bf16: bool = True
    """whether it computes in bf16"""
    host_bandwidth: float = 25e9
    """of a rank between device and host memory (PCIe 4.0 x16 moves about this)"""
    utilisation: float | None = None
    """share of the peak that forward and backward reach; None: as the roofline of the kernels says"""

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


def parse_bytes(text: str, name: str) -> int:
    """An amount of memory in bytes; a plain number is GiB, and so are G and GiB, while GB is 10^9.

    Raises:
        UserError: not an amount, or one that no machine has; names the option.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in UNITS or float(match[1]) == 0:
        raise UserError(f"{name}: {text!r} is no amount of memory; give one such as 80GiB or 24GB")
    value = int(float(match[1]) * UNITS[unit])
    if not LEAST <= value <= MOST:
        much = "more than any machine has" if value > MOST else "too little to train anything"
        plain = "; a plain number means GiB" if not unit else ""
        raise UserError(f"{name}: {text!r} is {much}{plain}; give one such as 80GiB or 24GB")
    return value


def readable(size: float) -> str:
    """Bytes for people: 1.5 GiB, 20 MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"


def compared(needed: float, available: float) -> tuple[str, str]:
    """Two amounts in the same unit, with as many digits as it takes to see which is larger."""
    unit, name = (GIB, "GiB") if max(needed, available) >= GIB else (1 << 20, "MiB")
    digits = digits_between([(needed, available)], unit, 1)
    return f"{needed / unit:.{digits}f} {name}", f"{available / unit:.{digits}f} {name}"


def digits_between(pairs: list[tuple[float, float]], unit: int, least: int) -> int:
    """Digits after the point, at least `least`, with which both numbers of each pair still differ."""
    for digits in range(least, 9):
        if all(one == other or f"{one / unit:.{digits}f}" != f"{other / unit:.{digits}f}" for one, other in pairs):
            return digits
    return 9


def described_hardware(
    gpu: str | None, gpus: int, per_node: int, memory: int | None, precision: str = "bf16"
) -> Hardware:
    """The hardware that the user describes; what isn't said is taken from the named or nearest card.

    Args:
        precision: what the peak is of.

    Raises:
        UserError: an unknown card.
    """
    name = assumed_gpu(memory or GPUS["a100"].memory) if gpu is None else named_gpu(gpu)
    if name is None:
        raise UserError(f"gpu: {gpu!r} is unknown; choose one of {', '.join(GPUS)}, or give gpu-memory and peak-tflops")
    card = GPUS[name]
    return Hardware(
        name=name,
        accelerator="cuda",
        ranks=gpus,
        ranks_per_node=min(per_node, gpus),
        memory=memory or card.memory,
        host_memory=512 * GIB,
        peak_flops=card.fp32_flops if precision == "fp32" else card.peak_flops,
        memory_bandwidth=card.memory_bandwidth,
        link_bandwidth=card.link_bandwidth,
        bf16=card.bf16,
    )


def host_memory() -> int:
    """Bytes of this machine's memory."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def this_machine(precision: str) -> Hardware:
    """This machine: its GPUs, or its CPU as one rank whose speed is measured in half a second.

    A GPU that isn't in the table gets the rates of the card with the nearest memory.
    """
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(0)
        known = detected_gpu(properties.name, properties.total_memory)
        described = described_hardware(known, count, count, int(properties.total_memory), precision)
        return replace(described, name=properties.name, host_memory=host_memory(), bf16=properties.major >= 8)
    flops, bandwidth = measured_cpu(precision)
    return Hardware(
        name=f"CPU, {torch.get_num_threads()} thread(s), GEMM {flops / 1e9:.0f} GFLOP/s measured",
        accelerator="cpu",
        ranks=1,
        ranks_per_node=1,
        memory=host_memory(),
        host_memory=host_memory(),
        peak_flops=flops,
        memory_bandwidth=bandwidth,
        link_bandwidth=bandwidth / 2,
        utilisation=CPU_UTILISATION,
    )


def measured_cpu(precision: str) -> tuple[float, float]:
    """FLOP/s of a matrix product and bytes a second of a copy on this CPU, best of a few tries."""
    import time

    import torch

    kind = torch.float32 if precision == "fp32" else torch.bfloat16
    size = 1024
    left, right = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
    source = torch.empty(1 << 24)
    target = torch.empty_like(source)

    def best(work: object, tries: int = 6) -> float:
        seconds = []
        for _ in range(tries):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return 2 * size**3 / best(lambda: left @ right), 8 * source.numel() / best(lambda: target.copy_(source))
