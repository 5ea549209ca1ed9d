"""An optimizer that the package doesn't know: stochastic gradient descent with momentum (Sutskever et al. 2013).

Embeddings learn at half the rate of the rest. As a script it is launch/train.py with one optimizer more.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import OPTIMIZERS, OptimConfig
from engine.config.optimizer import ExactRule, ExactStep, ExactSum, Group, OptimizerEntry
from engine.errors import RunError
from engine.train.certificate.certificate import UpdateCertificate
from launch.cli import run_command
from launch.train import main
from tests.train.certificate.verify_worker import Case, engine_of, train_step
from tests.zero.partition_worker import full_weights

STATE = "momentum_buffer"


@dataclass(frozen=True)
class MomentumRule(ExactRule):
    """buffer = momentum * buffer + gradient + decay * weight, from zero; the step is the buffer."""

    momentum: float
    weight_decay: float

    gradient_share = 1.0

    def step(self, old: Mapping[str, Tensor]) -> ExactStep:
        parts = (self.momentum * old[STATE], old["gradient"], self.weight_decay * old["weight"])
        buffer = ExactSum(sum(parts, torch.zeros(())), sum((part.abs() for part in parts), torch.zeros(())))
        return ExactStep({STATE: buffer}, buffer)


class Momentum(OptimizerEntry):
    """Takes the first of optim.betas for its momentum."""

    states = (STATE,)
    step_bytes = 22
    options = frozenset({"betas", "weight_decay"})

    def __init__(self, multiplier: float = 0.5, told: float | None = None) -> None:
        """Args: the rate multiplier of embeddings; what the exact rule takes for the momentum, in place of the true."""
        self.multiplier, self.told = multiplier, told

    def groups(self, shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> list[Group]:
        slow = tuple(name for name in shapes if "embedding" in name)
        others = tuple(name for name in shapes if "embedding" not in name)
        return [Group(slow, config.weight_decay, rate_multiplier=self.multiplier), Group(others, config.weight_decay)]

    def build(
        self, groups: list[dict[str, Any]], config: OptimConfig, device: torch.device, zero_stage: int
    ) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.0, momentum=config.betas[0])

    def exact(self, config: OptimConfig, weight_decay: float, step: int) -> ExactRule:
        return MomentumRule(config.betas[0] if self.told is None else self.told, weight_decay)


def changes(folder: Path, stage: int, multiplier: float, told: float | None = None) -> dict[str, Tensor] | str:
    """What two steps of an engine change of each parameter, both verified; the failure's line if one is wrong."""
    entry = Momentum(multiplier, told)
    OPTIMIZERS.register("momentum", entry)
    try:
        zero, optim = engine_of(Case(stage, "fp32", "adamw", options={"name": "momentum", "betas": (0.9, 0.9)}), 1)
        before, printed = full_weights(zero.model.module), io.StringIO()
        certificate = UpdateCertificate(zero, optim, 2, folder)
        with contextlib.redirect_stdout(printed):
            for number in (1, 2):
                train_step(zero, number, certificate)
        assert len(printed.getvalue().splitlines()) == 2
        return {name: weight - before[name] for name, weight in full_weights(zero.model.module).items()}
    except RunError as error:
        return str(error)
    finally:
        OPTIMIZERS.remove("momentum")


if __name__ == "__main__":
    OPTIMIZERS.register("momentum", Momentum())
    run_command(main)
