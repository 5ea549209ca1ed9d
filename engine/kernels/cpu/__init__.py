"""The back end of CPUs: C++ through ctypes."""

from __future__ import annotations

from engine.kernels.cpu.kernels import (
    adamw_step_,
    global_norm,
    lamb_apply_,
    lamb_moments_,
    lamb_step_,
    softmax_cross_entropy_,
)
from engine.kernels.cpu.layers import (
    LANES,
    add_rows,
    attends_bf16,
    column_sum,
    geglu,
    geglu_backward,
    gelu,
    gelu_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    multiplies_bf16,
)
from engine.kernels.cpu.library import available
from engine.kernels.cpu.packed import attention, attention_backward, rotary_attention, rotary_attention_backward

__all__ = [
    "LANES",
    "adamw_step_",
    "add_rows",
    "attends_bf16",
    "attention",
    "attention_backward",
    "available",
    "column_sum",
    "geglu",
    "geglu_backward",
    "gelu",
    "gelu_backward",
    "global_norm",
    "lamb_apply_",
    "lamb_moments_",
    "lamb_step_",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "multiplies_bf16",
    "rotary_attention",
    "rotary_attention_backward",
    "softmax_cross_entropy_",
]
