"""Which adapter belongs to which class."""

from __future__ import annotations

from typing import Any

import torch

from engine.errors import UserError
from engine.registry import Registry
from engine.zero.wrappers.base import Wrapper, described
from engine.zero.wrappers.flat import Bf16Wrapper, Zero12Wrapper
from engine.zero.wrappers.stage_0 import HalfPrecisionWrapper, NoWrapper
from engine.zero.wrappers.stage_3 import Zero3Wrapper

#: the adapters by the exact name of DeepSpeed's class: its subclasses lay out differently
WRAPPERS: Registry[type[Wrapper]] = Registry(
    "zero_optimization",
    {
        "FP16_UnfusedOptimizer": HalfPrecisionWrapper,
        "BF16_Optimizer": Bf16Wrapper,
        "DeepSpeedZeroOptimizer": Zero12Wrapper,
        "DeepSpeedZeroOptimizer_Stage3": Zero3Wrapper,
    },
)


def wrapper_of(engine: Any) -> Wrapper:
    """The adapter to the optimizer of a DeepSpeed engine, at any stage and precision.

    Raises:
        UserError: no adapter is registered for its class.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return NoWrapper(engine)
    name = type(optimizer).__name__
    if name not in WRAPPERS.names:
        raise UserError(
            f"zero_optimization: the optimizer's tensors can't be mapped to parameters under {described(optimizer)}; "
            "use stage 0, 1, 2 or 3 without zenflow or super_offload, and with an optimizer of your own"
        )
    return WRAPPERS.get(name)(engine)
