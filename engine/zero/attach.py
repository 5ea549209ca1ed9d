"""Connects a fused optimizer to the DeepSpeed engine that hands it its tensors.

The optimizer learns what the tensors consist of, and takes over unscaling and clipping: DeepSpeed computes the gradient
norm, decides on overflow, and would then multiply all gradients by one factor in a pass of its own (8 bytes a
parameter); it hands over the factor instead. The arithmetic is DeepSpeed's, so the bits of the update are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels.dispatch import tensor_lists
from engine.optim.fused import FusedOptimizer
from engine.zero.partition import shards


def attach(optimizer: FusedOptimizer, engine: Any) -> None:
    """Tell the optimizer about the engine's layout, and fold unscaling and clipping into its step.

    Args:
        optimizer: the client optimizer that `deepspeed.initialize` was given.
        engine: what that returned.

    Raises:
        UserError: the layout is unsupported or unknown.
    """
    optimizer.lay_out(shards(engine))
    wrapper = engine.optimizer
    if wrapper is optimizer:
        _clip_itself(optimizer, engine)
    elif hasattr(wrapper, "fp32_groups_gradient_flat_partition"):
        _take_clipping(optimizer, wrapper)
    else:
        _take_unscaling(optimizer, wrapper)
        if _is_direct(wrapper):
            _step_directly(optimizer, wrapper)


def _clip_itself(optimizer: FusedOptimizer, engine: Any) -> None:
    """Stage 0 in fp32, where DeepSpeed would call torch's clip_grad_norm_: the optimizer's own clipping is fused."""
    optimizer.defaults["max_grad_norm"] = engine.gradient_clipping()
    engine._config.gradient_clipping = 0.0


def _take_clipping(optimizer: FusedOptimizer, wrapper: Any) -> None:
    """BF16_Optimizer: no loss scale; it clips if `clip_grad` is positive, after storing the norm."""
    limit, wrapper.clip_grad = wrapper.clip_grad, 0.0

    def scale() -> Tensor | float:
        if not limit:
            return 1.0
        norm = _own_precision(wrapper._global_grad_norm)
        factor: Tensor = (limit / (norm + 1e-6)).clamp(max=1.0)
        return factor

    optimizer.scale = scale


def _take_unscaling(optimizer: FusedOptimizer, wrapper: Any) -> None:
    """ZeRO 1 to 3, and stage 0 in half precision: `unscale_and_clip_grads` is called before each step.

    Its arguments differ over the wrappers; the norm, times the loss scale, is the last one of each. By then DeepSpeed
    may have raised the loss scale: gradients are divided by the one that the loss was multiplied by.
    """
    handed: list[Tensor | float] = [1.0]

    def hand_over(*arguments: Any, apply_scale: bool = True) -> Tensor | float:
        loss_scale = wrapper.loss_scale if optimizer.loss_scale is None else optimizer.loss_scale
        combined: Tensor | float = loss_scale
        if wrapper.clip_grad > 0.0:
            norm = _own_precision(arguments[-1])
            combined = (((norm / loss_scale) + 1e-6) / wrapper.clip_grad).clamp(min=1.0) * loss_scale
        handed[0] = 1.0 / combined
        return combined

    wrapper.unscale_and_clip_grads = hand_over
    optimizer.scale = lambda: handed[0]


def _own_precision(norm: Tensor | float) -> Tensor:
    """The norm as a tensor that isn't rounded yet: the factor is rounded once, as `mul_` would."""
    return norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)


def _is_direct(wrapper: Any) -> bool:
    """Stage 0 in bf16 on CPUs, with a DeepSpeed whose wrapper is the one that we know."""
    if not all(hasattr(wrapper, name) for name in ("fp16_groups", "fp32_groups", "_skip_invalid_grad_norm")):
        return False
    weights = [weight for group in wrapper.fp16_groups for weight in group]
    on_cpu = bool(weights) and tensor_lists(weights[0].device) is not None
    return on_cpu and all(weight.dtype == torch.bfloat16 for weight in weights)


def _step_directly(optimizer: FusedOptimizer, wrapper: Any) -> None:
    """The step reads bf16 gradients and writes bf16 weights, for which DeepSpeed makes five passes of its own.

    Those are a look for overflow, the norm, fp32 gradients, their scaling, and the copy of the weights. The norm is
    summed otherwise than DeepSpeed's, so the factor of clipping may differ in its last bits.
    """
    pairs = zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
    optimizer.low_precision = {
        id(master): weight for masters, weights in pairs for master, weight in zip(masters, weights, strict=True)
    }

    def step(closure: None = None) -> bool:
        norm = optimizer.gradient_norm()
        wrapper.overflow = not bool(norm.isfinite())
        if wrapper.overflow:
            skipped: bool = wrapper._skip_invalid_grad_norm()
            return skipped
        wrapper._global_grad_norm = float(norm)
        wrapper._update_scale(False)
        wrapper.unscale_and_clip_grads(norm.double())
        optimizer.step()
        return False

    wrapper.step = step
