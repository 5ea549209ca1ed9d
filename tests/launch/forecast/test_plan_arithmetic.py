"""What a plan's figures are made of, worked out a second time."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from engine.config import ModelConfig, Precision
from launch.forecast.command import main
from launch.forecast.hardware import GIB, described_hardware
from launch.forecast.kernels.bound import attainable
from launch.forecast.memory import Workload, forecast, shape_of
from launch.forecast.step_time import step_cost

BASE = shape_of(ModelConfig(size="base"), 30522)
WORK = Workload(BASE, 128, 8, stage=0, ranks=8, ranks_per_node=8, precision="bf16")
OPTIONS = ["--model=large", "--gpus=16", "--gpu=a100", "--global-batch=4096", "--sequence-length=512", "--tokens=1e12"]
SECONDS_OF_A_DAY = 24 * 60 * 60


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    """A plan of BERT-large on 16 GPUs, as JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*OPTIONS, "--json"]) == 0
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def test_days_are_the_steps_that_all_tokens_take(planned: dict[str, Any]) -> None:
    for row in planned["candidates"]:
        steps = 1e12 / (4096 * 512)
        assert row["days"] == pytest.approx(steps * row["cost"]["seconds"] / SECONDS_OF_A_DAY)
        assert row["tokens_per_second"] == pytest.approx(4096 * 512 / row["cost"]["seconds"])


def test_a_step_takes_the_sum_of_its_parts(planned: dict[str, Any]) -> None:
    for row in planned["candidates"]:
        parts = ("compute_seconds", "exposed_seconds", "optimizer_seconds", "host_seconds")
        assert row["cost"]["seconds"] == pytest.approx(sum(row["cost"][part] for part in parts))
        kinds = {name: size for name, size in row["memory"].items() if name not in ("total", "host")}
        assert row["memory"]["total"] == sum(kinds.values())


def test_the_table_shows_the_same_days(capsys: pytest.CaptureFixture[str], planned: dict[str, Any]) -> None:
    assert main(OPTIONS) == 0
    costs = capsys.readouterr().out.partition("an optimizer step")[2].splitlines()
    shown = {line.partition("  ")[0]: line.split()[-1] for line in costs if line.startswith("ZeRO-") and "x" in line}
    for row in planned["candidates"]:
        if row["fits"]:
            assert shown[row["name"]] == f"{row['days']:.2f}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("optimizer", "step_bytes"), [("adamw", 4 * (4 + 3)), ("lamb", 4 * (4 + 2) + 4 * (3 + 1))])
def test_an_update_moves_the_optimizers_bytes(stage: int, optimizer: str, step_bytes: int) -> None:
    """AdamW reads weight, gradient and two moments and writes all but the gradient, in fp32. LAMB writes the moments,
    then reads them and the weight again for the update, and writes the weight. Either reads the gradients once more to
    clip, and writes the bf16 weight.
    """
    hardware = described_hardware("a100", 8, 8, None)
    cost = step_cost(replace(WORK, stage=stage, optimizer=optimizer), 1, hardware)
    own = BASE.parameters() / (1 if stage == 0 else 8)
    assert cost.optimizer_seconds == pytest.approx(own * (step_bytes + 4 + 2) / attainable(hardware).memory_bandwidth)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_first_step_moves_one_list_of_fp32_tensors_at_a_time(precision: Precision) -> None:
    """On a GPU at stage 0, where parameters are apart; what LAMB keeps and moves is AdamW's."""
    little = replace(WORK, micro_batch=1, sequence_length=8, verify_update=0, stage=0, precision=precision)
    adamw, lamb = (forecast(replace(little, optimizer=name)) for name in ("adamw", "lamb"))
    assert adamw == lamb
    assert adamw.total - adamw.margin - adamw.model_states == pytest.approx(4 * BASE.parameters(), rel=1e-9)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_states_of_either_optimizer_are_two_moments(stage: int) -> None:
    for name in ("adamw", "lamb"):
        own = BASE.parameters() / (1 if stage == 0 else 8)
        assert forecast(replace(WORK, stage=stage, optimizer=name)).optimizer == pytest.approx(8 * own, abs=8)


def test_the_host_must_hold_what_all_ranks_of_a_node_offload(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model=1.3b", "--gpus=8", "--gpu=a100", "--global-batch=256", "--json"]

    def offloading(host_memory: int) -> dict[str, Any]:
        main([*options, f"--host-memory={host_memory / GIB!r}GiB"])
        rows = json.loads(capsys.readouterr().out)["candidates"]
        found: dict[str, Any] = next(row for row in rows if row["offload_optimizer"] == "cpu")
        return found

    needed = 8 * offloading(1 << 44)["memory"]["host"]
    assert needed > 0
    assert offloading(needed)["fits"]
    assert not offloading(needed - 1)["fits"]


@pytest.mark.parametrize(("recomputes", "backward"), [(False, 2 / 3), (True, 3 / 4)])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_hide_behind_backward_passes_alone(recomputes: bool, backward: float, accumulation: int) -> None:
    """Stage 2 reduces after each micro-batch, stage 1 during the last one; both gather parameters behind nothing."""
    slow = replace(described_hardware("a100", 8, 8, None), link_bandwidth=1e8)
    size = BASE.parameters() * 2 * 7 / 8 / 1e8
    for stage, reductions, passes in ((1, 1, 1), (2, accumulation, accumulation)):
        work = replace(WORK, stage=stage, activation_checkpointing=recomputes)
        cost = step_cost(work, accumulation, slow)
        hidden = cost.compute_seconds * backward * passes / accumulation
        assert hidden < size * reductions
        assert cost.exposed_seconds == pytest.approx(size * reductions - hidden + size)


def test_offload_sends_gradients_out_and_weights_back() -> None:
    hardware = described_hardware("a100", 8, 8, None)
    cost = step_cost(replace(WORK, stage=2, offload_optimizer="cpu"), 1, hardware)
    assert cost.host_seconds == pytest.approx(BASE.parameters() / 8 * (2 + 2) / hardware.host_bandwidth)
    assert cost.optimizer_seconds == pytest.approx(BASE.parameters() / 8 * 34 / hardware.host_bandwidth)
