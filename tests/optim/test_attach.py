"""Handing the factor of unscaling and clipping to the step gives the bits of DeepSpeed's own pass."""

from __future__ import annotations

import pytest
import torch

from benchmarks import zero_exactness
from benchmarks.zero_exactness import Case, apart, train
from engine.optim.partition import shards
from engine.train import zero
from launch import zero_config
from launch.launcher import single_process_variables
from tests.train.runs import free_port

CASES = [
    *(Case(stage, precision, "adamw", 2) for stage in (1, 2, 3) for precision in ("fp32", "bf16")),
    Case(0, "bf16", "adamw", 2),
    Case(2, "fp32", "lamb", 2),
]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in single_process_variables(free_port()).items():
        monkeypatch.setenv(name, value)
    zero.start_ranks()


def unattached(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights where DeepSpeed unscales and clips in its own pass."""
    monkeypatch.setattr(zero, "attach", lambda optimizer, engine: optimizer.lay_out(shards(engine)))
    return train(case, 0, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.stage}-{case.precision}-{case.optimizer}")
def test_the_weights_are_bitwise_those_of_deepspeeds_own_clipping(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    folded, unfolded = train(case, 0, 1), unattached(case, monkeypatch)
    assert all(torch.equal(folded[name], unfolded[name]) for name in unfolded)


def test_stage_0_in_fp32_clips_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(0, "fp32", "adamw", 2)
    folded = {name: weight.clone() for name, weight in train(case, 0, 1).items()}
    assert apart(folded, {name: w.double() for name, w in unattached(case, monkeypatch).items()}) < 1e-6


def test_a_loss_scale_that_is_raised_in_a_step_does_not_shrink_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # it computes correctly on CPUs
    monkeypatch.setattr(zero_exactness, "CLIP", 1e9)  # clipping would hide the scale
    single = train(Case(2, "fp32", "adamw", 2), 0, 1)
    scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "loss_scale_window": 3, "hysteresis": 1}
    monkeypatch.setattr(zero_config, "precision_section", lambda _: {"fp16": scaling})
    assert apart(train(Case(2, "fp16", "adamw", 2), 0, 1), {name: w.double() for name, w in single.items()}) < 2e-6
