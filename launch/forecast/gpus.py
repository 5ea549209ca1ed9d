"""The cards that a plan knows by name.

Memory is what the driver offers (the total that nvidia-smi prints, MiB), which with error correction is less than the
name says. Rates are NVIDIA's own, dense, without sparsity, and they are bounds:

- tensor: bf16 (V100, T4: fp16) matrix products with fp32 accumulation. Those of fp32 follow from it: they take TF32, at
  half of the rate, where there is bf16 (`engine.train.ranks.device.settle`), and no tensor cores on V100 and T4.
- memory: GB/s; link: GB/s to another GPU of the node in one direction, by NVLink, or what PCIe 3.0, 4.0 and 5.0 x16
  really move, 12, 25 and 50.

Sources: the data sheets of V100 (2020), T4 (2019), A10 (2021), A10G (2021), L4, L40, L40S (2023), RTX A6000 (2021),
RTX 6000 Ada (2023), A100 (2021), H100 (2023), H200 (2024) and HGX B200 (2025, an eighth of its eight GPUs); for GeForce
cards the white papers of GA102 (2020), Ada (2022) and RTX Blackwell (2025).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """A card: memory in bytes, rates a second."""

    memory: int
    peak_flops: float
    """tensor cores, bf16 or fp16"""
    memory_bandwidth: float
    link_bandwidth: float
    bf16: bool = True
    """whether it computes in bf16, which needs compute capability 8.0"""

    @property
    def fp32_flops(self) -> float:
        """Of fp32 matrix products."""
        return self.peak_flops / (2 if self.bf16 else 8)


def _gpu(mib: int, tensor: float, memory: float, link: float, *, bf16: bool = True) -> Gpu:
    return Gpu(mib * MIB, tensor * 1e12, memory * 1e9, link * 1e9, bf16)


GPUS: dict[str, Gpu] = {
    "v100-16": _gpu(16384, 125, 900, 150, bf16=False),
    "v100": _gpu(32768, 125, 900, 150, bf16=False),
    "t4": _gpu(15360, 65, 320, 12, bf16=False),
    "a10": _gpu(23028, 125, 600, 25),
    "a10g": _gpu(23028, 70, 600, 25),
    "l4": _gpu(23034, 121, 300, 25),
    "l40": _gpu(46068, 181, 864, 25),
    "l40s": _gpu(46068, 362, 864, 25),
    "rtx3090": _gpu(24576, 71, 936, 25),
    "rtx4090": _gpu(24564, 165, 1008, 25),
    "rtx5090": _gpu(32607, 209.5, 1792, 50),
    "a6000": _gpu(49140, 154.8, 768, 25),
    "rtx6000ada": _gpu(49140, 364.2, 960, 25),
    "a100-40": _gpu(40960, 312, 1555, 300),
    "a100": _gpu(81920, 312, 2039, 300),
    "h100-pcie": _gpu(81559, 756, 2000, 50),
    "h100": _gpu(81559, 989, 3350, 450),
    "h200": _gpu(143771, 989, 4800, 450),
    "b200": _gpu(183359, 2250, 7700, 900),
}
#: the card assumed for a memory size when none is named: of those that compute in bf16
ASSUMED = ("a10", "rtx5090", "a100-40", "a6000", "a100", "h200", "b200")
#: other ways to write a name, without marks
ALIASES = {
    "v10032": "v100", "a10080": "a100", "h10080": "h100", "h200141": "h200", "b200180": "b200", "t416": "t4",
    "a1024": "a10", "l424": "l4", "l4048": "l40", "l40s48": "l40s", "3090": "rtx3090", "4090": "rtx4090",
    "5090": "rtx5090", "rtxa6000": "a6000", "6000ada": "rtx6000ada", "rtx6000adageneration": "rtx6000ada",
    "v100sxm2": "v100", "a100sxm4": "a100", "a100sxm": "a100", "h100sxm5": "h100", "h100sxm": "h100",
}  # fmt: skip
#: what a driver's name of a card contains, where that is not the name here
WORDS = {
    "v100-16": {"v100"}, "rtx3090": {"rtx", "3090"}, "rtx4090": {"rtx", "4090"}, "rtx5090": {"rtx", "5090"},
    "rtx6000ada": {"6000", "ada"}, "a100-40": {"a100"}, "h100-pcie": {"h100", "pcie"},
}  # fmt: skip


def named_gpu(text: str) -> str | None:
    """The key of a card that a user names, such as "RTX 3090", "a100-80GB" or "NVIDIA L40S"; None for others."""
    plain = re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|tesla|geforce", "", text.lower()))
    keys = {name.replace("-", ""): name for name in GPUS} | ALIASES
    return keys.get(plain) or keys.get(plain.removesuffix("gb"))


def detected_gpu(name: str, memory: int) -> str | None:
    """The key of a card by the driver's name of it and its memory in bytes; None for one that isn't in the table."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    keys = [key for key in GPUS if WORDS.get(key, {key}) <= words]
    return min(keys, key=lambda key: (-len(WORDS.get(key, {key})), abs(GPUS[key].memory - memory)), default=None)


def assumed_gpu(memory: int) -> str:
    """The card of ASSUMED whose memory is nearest."""
    return min(ASSUMED, key=lambda name: abs(GPUS[name].memory - memory))
