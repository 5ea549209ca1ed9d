"""Optimizer and learning-rate schedule: a run's options, and the table of optimizers."""

from engine.config.optim.optimizer import OPTIMIZERS, optimizers_with_option, placed_groups
from engine.config.optim.options import OptimConfig, ScheduleName

__all__ = ["OPTIMIZERS", "OptimConfig", "ScheduleName", "optimizers_with_option", "placed_groups"]
