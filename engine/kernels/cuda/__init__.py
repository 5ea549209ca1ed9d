"""The back end of GPUs: CUDA C++ through NVRTC."""

from __future__ import annotations

from engine.kernels.cuda.kernels import (
    adamw_step_,
    available,
    global_norm,
    lamb_apply_,
    lamb_moments_,
    lamb_step_,
    softmax_cross_entropy_,
)

__all__ = [
    "adamw_step_",
    "available",
    "global_norm",
    "lamb_apply_",
    "lamb_moments_",
    "lamb_step_",
    "softmax_cross_entropy_",
]
