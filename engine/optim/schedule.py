"""Learning-rate schedules: pure functions of the step, so a resume needs no scheduler state."""

from __future__ import annotations

import math

from engine.config import OptimConfig
from engine.errors import UserError


def phase_steps(value: float, total: int) -> int:
    """Steps of a phase given as a share of `total` (below 1) or as a number of steps."""
    return round(value * total) if value < 1 else int(value)


def check_phases(config: OptimConfig, total: int) -> None:
    """Refuse a warm-up and a decay phase that together exceed the run.

    Raises:
        UserError: names optim.warmup (and optim.decay), the steps and the remedy.
    """
    warmup = phase_steps(config.warmup, total)
    decay = phase_steps(config.decay, total) if config.schedule == "wsd" else 0
    if warmup + decay > total:
        raise UserError(
            f"optim.warmup: {warmup} steps of warm-up and {decay} of decay exceed the run's {total} steps; "
            "shorten them or raise train.steps"
        )


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Learning rate of 0-based optimizer step `step` in a run of `total` steps.

    Warm-up is linear from peak/warmup (the first step moves) to the peak. After it, with x in [0, 1] the share
    of the remaining steps behind us and m the final share of the peak:

    - linear: 1 - (1 - m) x
    - polynomial: m + (1 - m) (1 - x)^power (You et al. 2020 train BERT with power 0.5 to 1)
    - cosine: m + (1 - m) (1 + cos pi x) / 2 (Loshchilov & Hutter 2017)
    - wsd: the peak, then linear to m over the decay phase (Hu et al. 2024, MiniCPM)
    - constant: the peak
    - range_test: m^(1 - x), which grows (Smith 2017 with geometric steps)
    """
    peak, floor = config.learning_rate, config.min_ratio
    warmup = phase_steps(config.warmup, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "linear":
        factor = 1.0 - (1.0 - floor) * done
    elif config.schedule == "polynomial":
        factor = floor + (1.0 - floor) * (1.0 - done) ** config.power
    elif config.schedule == "cosine":
        factor = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    elif config.schedule == "range_test":
        factor = floor ** (1.0 - done)
    else:
        decay = max(1, phase_steps(config.decay, total))
        factor = 1.0 - (1.0 - floor) * max(0.0, min(1.0, (step - (total - decay)) / decay))
    return peak * factor
