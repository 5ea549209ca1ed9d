"""Handing the factor of unscaling and clipping to the step gives the bits of DeepSpeed's own pass."""

from __future__ import annotations

from collections import Counter
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import zero_exactness
from benchmarks.zero_exactness import Case, apart, train
from engine.config import OptimConfig, RunConfig, TrainConfig
from engine.data.loading.loader import BatchLayout
from engine.kernels import cpu, dispatch
from engine.optim.build import build_optimizer
from engine.optim.fused import FusedOptimizer
from engine.zero import engine as zero
from engine.zero import states
from engine.zero.wrappers.base import Wrapper
from launch.zero import build as zero_config
from launch.zero.build import deepspeed_config
from tests.cuda_emulator.emulated import emulated_kernels

CASES = [
    *(Case(stage, precision, "adamw", 2) for stage in (1, 2, 3) for precision in ("fp32", "bf16")),
    Case(2, "fp32", "lamb", 2),
]
#: doubles every three steps
SCALING = {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "loss_scale_window": 3, "hysteresis": 1}


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


@pytest.mark.slow
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


class Operators(TorchDispatchMode):
    """Counts operators, but for views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and "empty" not in str(function):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def on_gpu(case: Case, step_apart: bool = False) -> tuple[dict[str, Tensor], Counter[str]]:
    """The weights with a GPU's kernels, emulated, which take flat tensors alone; the last update's operators.

    Args:
        step_apart: torch's AdamW in DeepSpeed's wrapper, as where the kernels can't be used.
    """
    counts: list[Counter[str]] = []
    step = zero.ZeroEngine.step

    def counted(self: zero.ZeroEngine, rate: float, *, last_micro_batch: bool) -> None:
        with Operators() as operators:
            step(self, rate, last_micro_batch=last_micro_batch)
        counts.append(operators.counts)

    kernels = None if step_apart else emulated_kernels()
    with (
        mock.patch.dict(dispatch.BACK_ENDS, cpu=lambda *_: kernels),
        mock.patch.object(zero.ZeroEngine, "step", counted),
    ):
        return attached(case), counts[-1]


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("fp32", "adamw"), pytest.param("bf16", "adamw", marks=pytest.mark.slow), ("bf16", "lamb")],
)
def test_stage_0_on_a_gpu_steps_flat_tensors_in_a_few_launches(precision: str, optimizer: str, rank: Pool) -> None:
    case = Case(0, precision, optimizer, 2)
    folded, operators = rank.apply(on_gpu, (case,))
    plain, many = rank.apply(on_gpu, (case, True))
    assert operators.total() < 30 < many.total()
    assert apart(folded, {name: weight.double() for name, weight in plain.items()}) < 1e-5
    groups = 2  # with weight decay and without
    steps = {name: count for name, count in operators.items() if name.startswith("zerobert.") and "step" in name}
    assert steps == {"zerobert.adamw_step_.default": groups} if optimizer == "adamw" else sum(steps.values()) == groups
    norms = 1 if precision == "bf16" else groups
    gathered = operators["zerobert.global_norm.default"], operators["aten.cat.default"]
    assert gathered == (norms, norms), "the gradients are gathered once, and nothing else"
    assert not any("copy_." in name for name in operators), "no weight or moment is moved again"


def resumed(folder: Path, optimizer: str) -> list[dict[str, Tensor]]:
    """The weights of an engine and of one that goes on from its snapshot, after two more updates of each."""
    config = RunConfig(
        optim=OptimConfig(name=optimizer, max_grad_norm=1.0), train=TrainConfig(zero_stage=0, precision="bf16")
    )
    values = deepspeed_config(config, BatchLayout(1, 1), "cpu")
    kernels, results = emulated_kernels(), []
    with mock.patch.dict(dispatch.BACK_ENDS, cpu=lambda *_: kernels):
        for begin in (0, 2):
            model = zero_exactness.Model()
            engine = zero.ZeroEngine(model, build_optimizer(model, config.optim, torch.device("cpu")), values)
            if begin:
                engine.load_states(folder)
            for step in range(begin, 4):
                engine.backward(engine.model(step, 0, 0))
                engine.step(1e-2, last_micro_batch=True)
                if step == 1:
                    states.snapshot(engine.wrapper, copy=True).write(folder)
            results.append({name: weight.clone() for name, weight in engine.full_state_dict().items()})
            engine.model.destroy()
    return results


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_resume_at_stage_0_on_a_gpu_is_exact(optimizer: str, rank: Pool, tmp_path: Path) -> None:
    whole, again = rank.apply(resumed, (tmp_path, optimizer))
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


def test_stage_0_in_fp32_clips_as_torch_does(rank: Pool) -> None:
    case = Case(0, "fp32", "adamw", 2)
    torchs = {name: weight.double() for name, weight in rank.apply(unattached, (case,)).items()}
    assert apart(rank.apply(attached, (case,)), torchs) < 1e-6


def test_a_loss_scale_that_is_raised_in_a_step_does_not_shrink_its_gradients(rank: Pool) -> None:
    single = rank.apply(unclipped, (Case(2, "fp32", "adamw", 2),))
    half = rank.apply(unclipped, (Case(2, "fp16", "adamw", 2),))
    assert apart(half, {name: weight.double() for name, weight in single.items()}) < 2e-6
