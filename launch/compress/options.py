"""What a user asks of `zerobert compress`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import require

FEWEST_SAMPLES = 8


@dataclass(frozen=True)
class CompressConfig:
    """Which roads are tried."""

    speeds: str = "1.5,2,3"
    """how many times as fast models are pruned to be, without training them again; empty: none is pruned"""
    students: str = ""
    """layers of students that are distilled from the model, such as 4,3; needs a run, whose data they learn"""
    minutes: float = 60.0
    """nothing new is begun after so long; what was begun is ended"""
    samples: int = 1024
    """training examples that pruning looks at"""
    calibration: int = 128
    """training samples that tell how far int8 is off"""
    threads: int = 1
    """of all that is timed"""

    def validate(self) -> None:
        """Raises: UserError: a field that can't be used."""
        for speed in self.pruned:
            require(1.0 < speed < math.inf, "speeds", self.speeds, "give numbers above 1, such as 1.5,2,3")
        for layers in self.distilled:
            require(layers >= 1, "students", self.students, "give numbers of layers, such as 4,3")
        require(self.minutes > 0.0, "minutes", self.minutes, "give a positive number")
        require(self.samples >= 1, "samples", self.samples, "give a whole number above 0")
        remedy = f"give at least {FEWEST_SAMPLES}"
        require(self.calibration >= FEWEST_SAMPLES, "calibration", self.calibration, remedy)
        require(self.threads >= 1, "threads", self.threads, "give at least 1")

    @property
    def pruned(self) -> tuple[float, ...]:
        """Speeds of pruned models."""
        return tuple(self._numbers("speeds", self.speeds, "give numbers above 1, such as 1.5,2,3"))

    @property
    def distilled(self) -> tuple[int, ...]:
        """Layers of students."""
        found = self._numbers("students", self.students, "give numbers of layers, such as 4,3")
        require(all(each.is_integer() for each in found), "students", self.students, "give whole numbers of layers")
        return tuple(int(each) for each in found)

    @staticmethod
    def _numbers(name: str, text: str, remedy: str) -> list[float]:
        try:
            return [float(each) for each in text.split(",") if each.strip()]
        except ValueError:
            require(False, name, text, remedy)
            raise
