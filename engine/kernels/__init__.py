"""Fused kernels for the loss and the optimizer step; the public door, which loads torch at first use only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.kernels.decoder_loss import linear_cross_entropy
    from engine.kernels.dispatch import select
    from engine.kernels.ops import adamw_step_, global_norm, lamb_step_, softmax_cross_entropy_
    from engine.kernels.segments import Segments

_HOMES = {
    "Segments": "segments",
    "adamw_step_": "ops",
    "global_norm": "ops",
    "lamb_step_": "ops",
    "linear_cross_entropy": "decoder_loss",
    "select": "dispatch",
    "softmax_cross_entropy_": "ops",
}

__all__ = [
    "Segments",
    "adamw_step_",
    "global_norm",
    "lamb_step_",
    "linear_cross_entropy",
    "select",
    "softmax_cross_entropy_",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
