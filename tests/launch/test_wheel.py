"""The wheel: built, installed into an empty folder, and used outside of a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.train.runs import environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into; its sources are a copy, as building leaves files in them."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", ".*", "runs", "build", "*.egg-info", "tests", "docs")
    shutil.copytree(ROOT, folder / "sources", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "sources")]
    subprocess.run(wheel, check=True, capture_output=True, text=True)
    target = folder / "installed"
    built = next(folder.glob("*.whl"))
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(built)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return target


def zerobert(installed: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_file_that_a_command_reads(installed: Path) -> None:
    for pattern in ("launch/recipes/**/*.yaml", "ds_configs/*.json", "slurm/*.sbatch", "engine/kernels/csrc/**/*.*"):
        there = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
        assert there
        assert there == {str(path.relative_to(installed)) for path in installed.glob(pattern)}


@pytest.mark.slow
def test_prepare_train_plan_and_submit_work_outside_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    zerobert(installed, tmp_path, "prepare", "--output", "data", "--vocab_size", "1000", "--workers", "0")
    printed = zerobert(installed, tmp_path, "train", "--debug", "--data.path", "data", "--output", "run")
    assert "update verified" in printed
    recipe = str(installed / "launch" / "recipes" / "pretrain_tiny.yaml")
    plan = zerobert(installed, tmp_path, "plan", "--config", recipe, "--gpus", "8", "--gpu", "h100")
    assert "ZeRO-2" in plan
    script = zerobert(installed, tmp_path, "submit", "--config", recipe, "--data.path", "data", "--dry-run")
    assert "srun --kill-on-bad-exit=1" in script
