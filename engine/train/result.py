"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.tasks.task import Best, Evaluation


@dataclass(frozen=True)
class RunResult:
    """How a run ended, the same on every rank."""

    steps: int
    loss: float
    """training loss at the last point of the curve: mean over the steps since the point before"""
    evaluation: Evaluation | None
    exported: Path
    best: Best | None
    """the evaluation whose weights were exported; None where the task has no best and the last weights were"""
