"""A wrapper that another package brings, with its adapter, is as good as those of DeepSpeed."""

from __future__ import annotations

from multiprocessing.pool import Pool

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from benchmarks.zero_exactness import BETA1, BETA2, CLIP, DECAY, EPS, RATE, SHAPES, STEPS, Case, apart, slope, weight
from tests.zero.clamping import trained

CASE = Case(2, "fp32", "adamw", 2)


def clamped() -> tuple[dict[str, Tensor], float]:
    """The weights of torch's AdamW over whole parameters in float64, and the share of elements that were clipped."""
    weights = {name: nn.Parameter(weight(name).double()) for name in SHAPES}
    decayed, others = ([w for w in weights.values() if (w.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(BETA1, BETA2), eps=EPS)
    clipped = []
    for step in range(STEPS):
        for name, w in weights.items():
            whole = torch.stack([slope(name, step, micro, 0).double() for micro in range(CASE.accumulation)]).sum(0)
            w.grad = whole.clamp(-CLIP, CLIP)
            clipped.append(float(w.grad.ne(whole).double().mean()))
        optimizer.step()
    return {name: w.detach() for name, w in weights.items()}, sum(clipped) / len(clipped)


@pytest.mark.slow
def test_a_registered_adapter_trains_with_its_wrappers_own_clipping(rank: Pool) -> None:
    found = rank.apply(trained, (CASE, 0, 1), {"registered": True})
    assert not isinstance(found, str), found
    truth, share = clamped()
    assert 0.01 < share < 0.5
    assert apart(found, truth) < 1e-6


def test_without_an_adapter_the_wrapper_is_refused_at_the_start(rank: Pool) -> None:
    message = rank.apply(trained, (CASE, 0, 1), {"registered": False})
    assert isinstance(message, str)
    assert message.startswith("zero_optimization: ")
    assert f"ClampingZeroOptimizer of DeepSpeed {deepspeed.__version__}; use stage 0, 1, 2 or 3 " in message
    assert "\n" not in message
