"""A training command that tells of its choice of kernels and of the trial of a micro-batch, as it makes them."""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels import dispatch
from engine.train import fit
from launch.cli import run_command
from launch.train import main

_agree, _fits = dispatch.agree, fit.fits


def agree(device: torch.device) -> None:
    """The ranks' agreement, in which kernels are built and checked."""
    print("KERNELS", torch.are_deterministic_algorithms_enabled(), dispatch._selected, flush=True)
    _agree(device)


def fits(*arguments: Any) -> bool:
    """The trial."""
    print("TRIAL", torch.are_deterministic_algorithms_enabled(), dispatch._selected, flush=True)
    return _fits(*arguments)


if __name__ == "__main__":
    dispatch.agree, fit.fits = agree, fits
    run_command(main)
