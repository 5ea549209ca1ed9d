"""Optimizers and learning-rate schedules; `FusedAdamW` and `FusedLamb` load torch at first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.optim.fused import FusedAdamW, FusedLamb

__all__ = ["FusedAdamW", "FusedLamb"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engine.optim import fused

    return getattr(fused, name)
