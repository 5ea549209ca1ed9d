"""Offload to the CPU's memory or to NVMe changes nothing but where tensors lie."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import NO_DROPOUT, can_swap, execute, losses, run
from tests.zero.offload_worker import AFTER, BEFORE, CASES, FEW

SWAPPED = [f"{name}-{precision}" for name in ("adamw", "lamb") for precision in ("fp32", "bf16")]
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in CASES]
)
Found = Callable[[str], dict[str, list[float]]]
needs_libaio = pytest.mark.skipif(not can_swap(), reason="ninja, a C++ compiler or libaio is missing")


def told(worker: str, file: Path, ranks: int, timeout: int, *cases: str) -> Any:
    """What the ranks of a worker found out."""
    done = execute(f"tests/zero/{worker}.py", str(file), *cases, ranks=ranks, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The losses of a case on 2 ranks, which follow all cases of its suite in one start."""

    @cache
    def losses_of(few: bool) -> dict[str, dict[str, list[float]]]:
        names = [name for name in CASES if (name in FEW) == few]
        file = tmp_path_factory.mktemp("offload") / "losses.json"
        result: dict[str, dict[str, list[float]]] = told("offload_worker", file, 2, 280, *names)
        return result

    return lambda name: losses_of(name in FEW)[name]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def swapped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case of NVMe on 1 and 2 ranks; the first of them builds DeepSpeed's async_io, which takes minutes."""
    folder = tmp_path_factory.mktemp("nvme")
    result: dict[str, Any] = told("nvme_worker", folder / "found.json", request.param, 800)
    assert list(folder.glob("*/swap/*")) == []
    return result


@every_case
def test_losses_are_those_without_offload(name: str, found: Found) -> None:
    case = found(name)
    assert len(case["offloaded"]) == BEFORE + AFTER
    assert case["offloaded"] == pytest.approx(case["plain"], abs=1e-6)
    assert case["plain"][0] - case["plain"][-1] > 1e-3  # it learns


@every_case
def test_a_checkpoint_saved_under_offload_resumes_with_and_without(name: str, found: Found) -> None:
    case = found(name)
    for way in ("resumed", "resumed without"):
        assert case[way] == pytest.approx(case["offloaded"][-AFTER:], abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_that_is_resumed_under_offload_has_the_losses_of_one_without(store: Path, tmp_path: Path) -> None:
    common = [f"--data.path={store}", "--train.zero_stage=3", "--optim.schedule=constant", "--optim.warmup=0"]
    common += NO_DROPOUT
    offload = ["--zero.offload_optimizer=cpu", "--zero.offload_parameters=cpu"]
    run(tmp_path / "plain", *common, "--train.steps=7", ranks=2)
    run(tmp_path / "offloaded", *common, *offload, "--train.steps=5", ranks=2)
    resumed = [*common, *offload, "--train.steps=7", "--resume=auto"]
    run(tmp_path / "offloaded", *resumed, ranks=2)
    for way in ("plain", "offloaded"):
        rows = list(csv.DictReader((tmp_path / way / "verify_update.csv").open()))
        assert max(float(row["error"]) for row in rows) < 1e-5
    plain, offloaded = ([loss for _, loss in losses(tmp_path / way)] for way in ("plain", "offloaded"))
    assert len(plain) == len(offloaded) == 7
    assert offloaded == pytest.approx(plain, abs=1e-6)


@needs_libaio
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SWAPPED)
def test_on_nvme_losses_and_exports_are_those_of_the_cpu_to_the_bit(name: str, swapped: dict[str, Any]) -> None:
    """Losses are sums that begin at 7,000; of those without offload DeepSpeed takes the gradient norm otherwise."""
    case = swapped[name]
    assert case["swapped"] >= 1
    assert len(case["losses"]["nvme"]) == BEFORE + AFTER
    assert case["losses"]["nvme"] == case["losses"]["cpu"]
    assert case["losses"]["nvme"] == pytest.approx(case["losses"]["none"], abs=1e-6 * case["losses"]["none"][0])
    assert case["exported"] == 8
    assert case["apart"] == 0.0


@needs_libaio
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SWAPPED)
@pytest.mark.parametrize(("source", "place"), [("nvme", "nvme"), ("nvme", "none"), ("none", "nvme")])
def test_checkpoints_go_to_nvme_and_back(name: str, source: str, place: str, swapped: dict[str, Any]) -> None:
    losses = swapped[name]["losses"]
    assert losses[f"{source} to {place}"] == pytest.approx(losses[source][-AFTER:], abs=1e-6 * losses["none"][0])


@needs_libaio
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_parameter_that_takes_no_part_in_a_step_has_no_gradient_from_an_earlier_one(swapped: dict[str, Any]) -> None:
    losses = swapped["partly used"]
    for place in ("cpu", "nvme"):
        assert losses[place] == pytest.approx(losses["none"], abs=1e-6 * losses["none"][0] / 10)


@needs_libaio
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_on_nvme_is_resumed_without_it_and_leaves_nothing_there(store: Path, tmp_path: Path) -> None:
    common = [f"--data.path={store}", "--train.zero_stage=3", "--optim.schedule=constant", "--optim.warmup=0"]
    common += [*NO_DROPOUT, "--model.hidden_size=256"]
    disk = tmp_path / "disk"
    run(tmp_path / "plain", *common, "--train.steps=7", ranks=2)
    nvme = ["--zero.offload_optimizer=nvme", f"--zero.nvme_path={disk}"]
    printed = run(tmp_path / "nvme", *common, *nvme, "--train.steps=5", ranks=2)
    assert printed.count("update not verified: that would take the memory") == 1
    assert list(disk.iterdir()) == []
    run(tmp_path / "nvme", *common, "--train.steps=7", "--resume=auto", ranks=2)
    plain, offloaded = ([loss for _, loss in losses(tmp_path / way)] for way in ("plain", "nvme"))
    assert len(plain) == len(offloaded) == 7
    assert offloaded == pytest.approx(plain, abs=1e-6)
