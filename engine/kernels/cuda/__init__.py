"""The back end of GPUs: CUDA C++ through NVRTC, and torch's flash attention."""

from __future__ import annotations

from engine.kernels.cuda.activations import ALIGNED
from engine.kernels.cuda.attention import attends, lacks_flash, varlen_attention, varlen_attention_backward
from engine.kernels.cuda.kernels import (
    adamw_step_,
    available,
    column_sum,
    geglu,
    geglu_backward,
    gelu,
    gelu_backward,
    global_norm,
    lamb_apply_,
    lamb_moments_,
    lamb_step_,
    layer_norm,
    layer_norm_backward,
    linear,
    softmax_cross_entropy_,
)
from engine.kernels.cuda.normalisation import normalises

__all__ = [
    "ALIGNED",
    "adamw_step_",
    "attends",
    "available",
    "column_sum",
    "geglu",
    "geglu_backward",
    "gelu",
    "gelu_backward",
    "global_norm",
    "lacks_flash",
    "lamb_apply_",
    "lamb_moments_",
    "lamb_step_",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "normalises",
    "softmax_cross_entropy_",
    "varlen_attention",
    "varlen_attention_backward",
]
