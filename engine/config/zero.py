"""Where ZeRO keeps what a GPU has no room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import require

OffloadTarget = Literal["none", "cpu", "nvme"]


@dataclass
class ZeroConfig:
    """ZeRO-Offload and ZeRO-Infinity; the ZeRO stage itself is train.zero_stage."""

    offload_optimizer: OffloadTarget = "none"
    """optimizer states and fp32 weights: none keeps them on the GPU, cpu (stages 1 to 3) in host memory, nvme (stage 3)
    in files, of which a part at a time is read, stepped and written on the CPU; what is below 1 MiB stays in memory"""
    offload_parameters: OffloadTarget = "none"
    """parameters between their uses: none or cpu (stage 3)"""
    nvme_path: str | None = None
    """folder on a local disk for offload_optimizer nvme, with room for 16 bytes a parameter; a run's files there are
    its own and go at its end"""

    def validate(self) -> None:
        for name in ("offload_optimizer", "offload_parameters"):
            value = getattr(self, name)
            require(value in ("none", "cpu", "nvme"), f"zero.{name}", value, "choose none, cpu or nvme")
        require(
            self.offload_parameters != "nvme",
            "zero.offload_parameters",
            self.offload_parameters,
            "DeepSpeed 0.19 fails while it swaps parameters to NVMe; choose cpu",
        )
        needs_path = self.offload_optimizer == "nvme"
        require(bool(self.nvme_path) or not needs_path, "zero.nvme_path", self.nvme_path, "give a folder for nvme")

    def check_stage(self, stage: int) -> None:
        """Refuse an offload that the ZeRO stage doesn't have."""
        lowest = {"none": 0, "cpu": 1, "nvme": 3}[self.offload_optimizer]
        remedy = f"train.zero_stage {stage} can't; choose stage {lowest} or higher"
        require(stage >= lowest, "zero.offload_optimizer", self.offload_optimizer, remedy)
        remedy = f"train.zero_stage {stage} keeps whole parameters; choose stage 3"
        require(stage == 3 or self.offload_parameters == "none", "zero.offload_parameters", "cpu", remedy)
