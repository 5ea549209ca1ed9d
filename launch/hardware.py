"""The machines of a plan: what the user says about them, or what this machine shows.

Peak rates are the vendors' dense figures (NVIDIA's data sheets of each card): bf16 with fp32 accumulation (V100: fp16),
memory bandwidth, and one direction of the link between the GPUs of a node. They are bounds; what a step reaches of them
is `Hardware.utilisation`, an assumption that every plan prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from engine.errors import UserError

GIB = 1 << 30
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)
}


@dataclass(frozen=True)
class Gpu:
    """A card: memory in bytes, rates a second."""

    memory: int
    peak_flops: float
    memory_bandwidth: float
    link_bandwidth: float


GPUS: dict[str, Gpu] = {
    "v100": Gpu(32 * GIB, 125e12, 0.9e12, 150e9),
    "a10": Gpu(24 * GIB, 125e12, 0.6e12, 25e9),
    "l4": Gpu(24 * GIB, 121e12, 0.3e12, 25e9),
    "rtx3090": Gpu(24 * GIB, 71e12, 0.936e12, 25e9),
    "rtx4090": Gpu(24 * GIB, 165e12, 1.008e12, 25e9),
    "a6000": Gpu(48 * GIB, 155e12, 0.768e12, 25e9),
    "a100-40": Gpu(40 * GIB, 312e12, 1.555e12, 300e9),
    "a100": Gpu(80 * GIB, 312e12, 2.039e12, 300e9),
    "h100": Gpu(80 * GIB, 989e12, 3.35e12, 450e9),
    "h200": Gpu(141 * GIB, 989e12, 4.8e12, 450e9),
}
#: the card assumed for a memory size when none is named
ASSUMED = ("a10", "v100", "a100-40", "a6000", "a100", "h200")


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
    host_bandwidth: float = 25e9
    """of a rank between device and host memory (PCIe 4.0 x16 moves about this)"""
    utilisation: float = 0.45
    """assumed share of the peak that forward and backward reach; what 580 sequences/s of BERT-large with 128 tokens on
    an A100 come to (NVIDIA DeepLearningExamples, published)"""

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


def parse_bytes(text: str, name: str) -> int:
    """Bytes of "80GiB", "24 GB", "500MB" or a plain number.

    Raises:
        UserError: it is none of these, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].upper() if found else ""
    value = int(float(found[1]) * UNITS[unit]) if found and unit in UNITS else 0
    if value <= 0:
        raise UserError(f"{name}: {text!r} is no amount of memory; give one such as 80GiB or 24GB")
    return value


def readable(size: float) -> str:
    """Bytes for people: 1.5 GiB, 20 MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"


def assumed_gpu(memory: int) -> str:
    """The card whose memory is nearest."""
    return min(ASSUMED, key=lambda name: abs(GPUS[name].memory - memory))


def described_hardware(gpu: str | None, gpus: int, per_node: int, memory: int | None) -> Hardware:
    """The hardware that the user describes; what isn't said is taken from the named or nearest card.

    Raises:
        UserError: an unknown card.
    """
    if gpu is not None and gpu not in GPUS:
        raise UserError(f"gpu: {gpu!r} is unknown; choose one of {', '.join(GPUS)}, or give gpu-memory and peak-tflops")
    name = gpu or assumed_gpu(memory or GPUS["a100"].memory)
    card = GPUS[name]
    return Hardware(
        name=name,
        accelerator="cuda",
        ranks=gpus,
        ranks_per_node=min(per_node, gpus),
        memory=memory or card.memory,
        host_memory=512 * GIB,
        peak_flops=card.peak_flops,
        memory_bandwidth=card.memory_bandwidth,
        link_bandwidth=card.link_bandwidth,
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
        known = next((name for name in GPUS if name.split("-")[0] in properties.name.lower()), None)
        found = described_hardware(known, count, count, int(properties.total_memory))
        return replace(found, name=properties.name, host_memory=host_memory())
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
