"""Handing the factor of unscaling and clipping to the step gives the bits of DeepSpeed's own pass."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.pool import Pool
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import zero_exactness
from benchmarks.zero_exactness import Case, apart, train
from engine.kernels import cpu
from engine.optim.fused import FusedOptimizer
from engine.zero import engine as zero
from engine.zero.wrappers.base import Wrapper
from launch.zero import build as zero_config
from tests.single_rank import single_rank
from tests.train.runs import free_port

CASES = [
    *(Case(stage, precision, "adamw", 2) for stage in (1, 2, 3) for precision in ("fp32", "bf16")),
    Case(2, "fp32", "lamb", 2),
]
#: doubles every three steps
SCALING = {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "loss_scale_window": 3, "hysteresis": 1}


@pytest.fixture(scope="module")
def rank() -> Iterator[Pool]:
    with single_rank(free_port()) as pool:
        yield pool


def attached(case: Case) -> dict[str, Tensor]:
    """The weights where the step unscales and clips."""
    return {name: weight.clone() for name, weight in train(case, 0, 1).items()}


def unattached(case: Case) -> dict[str, Tensor]:
    """The weights where DeepSpeed unscales and clips in its own pass."""
    with mock.patch.object(zero, "attach", lambda optimizer, wrapper: optimizer.lay_out(wrapper.shards())):
        return attached(case)


def unclipped(case: Case) -> dict[str, Tensor]:
    """The weights without clipping, which would hide the loss scale; in fp16 with one that grows."""
    from deepspeed.accelerator import get_accelerator

    precision = {"fp16": SCALING} if case.precision == "fp16" else {}
    with (
        mock.patch.object(get_accelerator(), "is_fp16_supported", return_value=True),  # it computes correctly on CPUs
        mock.patch.object(zero_exactness, "CLIP", 1e9),
        mock.patch.object(zero_config, "precision_section", return_value=precision),
    ):
        return attached(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.stage}-{case.precision}-{case.optimizer}")
def test_the_weights_are_bitwise_those_of_deepspeeds_own_clipping(case: Case, rank: Pool) -> None:
    folded, unfolded = rank.apply(attached, (case,)), rank.apply(unattached, (case,))
    assert all(torch.equal(folded[name], unfolded[name]) for name in unfolded)


def weights(case: Case) -> tuple[dict[str, Tensor], bool]:
    """The fp32 weights, and whether the step reads the model's own gradients."""
    seen = []
    attach = zero.attach

    def attach_and_look(optimizer: FusedOptimizer, wrapper: Wrapper) -> None:
        attach(optimizer, wrapper)
        seen.append(bool(optimizer.low_precision))

    with mock.patch.object(zero, "attach", attach_and_look):
        return attached(case), seen[-1]


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler for the CPU kernels")
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_stage_0_in_bf16_steps_from_the_models_gradients(optimizer: str, rank: Pool) -> None:
    """Bits may differ from DeepSpeed's: its norm is a sum in another order. A bf16 weight that rounds the other way
    changes the next gradient."""
    case = Case(0, "bf16", optimizer, 2)
    folded, direct = rank.apply(weights, (case,))
    assert direct
    deepspeeds = {name: weight.double() for name, weight in rank.apply(unattached, (case,)).items()}
    assert apart(folded, deepspeeds) < 1e-5


def test_stage_0_in_fp32_clips_as_torch_does(rank: Pool) -> None:
    case = Case(0, "fp32", "adamw", 2)
    torchs = {name: weight.double() for name, weight in rank.apply(unattached, (case,)).items()}
    assert apart(rank.apply(attached, (case,)), torchs) < 1e-6


def test_a_loss_scale_that_is_raised_in_a_step_does_not_shrink_its_gradients(rank: Pool) -> None:
    single = rank.apply(unclipped, (Case(2, "fp32", "adamw", 2),))
    half = rank.apply(unclipped, (Case(2, "fp16", "adamw", 2),))
    assert apart(half, {name: weight.double() for name, weight in single.items()}) < 2e-6
