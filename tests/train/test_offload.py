"""Offload to the CPU's memory changes nothing but where tensors lie."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.train.offload_worker import AFTER, BEFORE, CASES
from tests.train.runs import NO_DROPOUT, environment, free_port, losses, run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """Every case on 2 ranks, in one start of them."""
    file = tmp_path_factory.mktemp("offload") / "losses.json"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [sys.executable, *launcher, "-m", "tests.train.offload_worker", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, dict[str, list[float]]] = json.loads(file.read_text())
    return result


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_without_offload(name: str, found: dict[str, dict[str, list[float]]]) -> None:
    case = found[name]
    assert len(case["offloaded"]) == BEFORE + AFTER
    assert case["offloaded"] == pytest.approx(case["plain"], abs=1e-6)
    assert case["plain"][0] - case["plain"][-1] > 1e-3  # it learns


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_saved_under_offload_resumes_with_and_without(
    name: str, found: dict[str, dict[str, list[float]]]
) -> None:
    case = found[name]
    for way in ("resumed", "resumed without"):
        assert case[way] == pytest.approx(case["offloaded"][-AFTER:], abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_that_is_resumed_under_offload_has_the_losses_of_one_without(store: Path, tmp_path: Path) -> None:
    common = [f"--data.path={store}", "--train.zero_stage=3", "--optim.schedule=constant", "--optim.warmup=0"]
    common += NO_DROPOUT
    offload = ["--zero.offload_optimizer=cpu", "--zero.offload_parameters=cpu"]
    run(tmp_path / "plain", *common, "--train.steps=7", launcher="deepspeed", ranks=2)
    run(tmp_path / "offloaded", *common, *offload, "--train.steps=5", launcher="deepspeed", ranks=2)
    resumed = [*common, *offload, "--train.steps=7", "--resume=auto"]
    run(tmp_path / "offloaded", *resumed, launcher="deepspeed", ranks=2)
    for way in ("plain", "offloaded"):
        rows = list(csv.DictReader((tmp_path / way / "verify_update.csv").open()))
        assert max(float(row["error"]) for row in rows) < 1e-5
    plain, offloaded = ([loss for _, loss in losses(tmp_path / way)] for way in ("plain", "offloaded"))
    assert len(plain) == len(offloaded) == 7
    assert offloaded == pytest.approx(plain, abs=1e-6)
