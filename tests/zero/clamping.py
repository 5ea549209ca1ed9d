"""A wrapper that the package doesn't know, with its adapter: ZeRO 1 and 2 that clip elements of the gradient."""

from __future__ import annotations

from typing import Any
from unittest import mock

import deepspeed
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from benchmarks.zero_exactness import Case, train
from engine.errors import UserError
from engine.optim.fused import FusedOptimizer
from engine.zero.wrappers.flat import Zero12Wrapper
from engine.zero.wrappers.known import WRAPPERS


class ClampingZeroOptimizer(DeepSpeedZeroOptimizer):
    """No element of the gradient is larger than `clip_grad`, whatever the norm."""

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Any) -> None:
        for gradient in grad_groups_flat:
            gradient.clamp_(-self.clip_grad, self.clip_grad)


class ClampingWrapper(Zero12Wrapper):
    """Such clipping is no factor that the client's step could multiply by: it stays with DeepSpeed."""

    def take_clipping(self, client: FusedOptimizer) -> None:
        return


def trained(case: Case, rank: int, ranks: int, *, registered: bool) -> dict[str, Tensor] | str:
    """The weights that `benchmarks.zero_exactness` trains under this wrapper; the line of the refusal."""
    if registered:
        WRAPPERS.register("ClampingZeroOptimizer", ClampingWrapper)
    try:
        with mock.patch.object(deepspeed.runtime.engine, "DeepSpeedZeroOptimizer", ClampingZeroOptimizer):
            return {name: weight.clone() for name, weight in train(case, rank, ranks).items()}
    except UserError as refusal:
        return str(refusal)
    finally:
        if registered:
            WRAPPERS.remove("ClampingZeroOptimizer")
