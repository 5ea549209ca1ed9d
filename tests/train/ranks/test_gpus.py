"""What GPUs can't do is refused in one line. No GPU is here: torch is told that there are some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from engine.config import TrainConfig
from engine.errors import UserError
from engine.train.ranks.gpus import check_gpu, check_hidden, check_precision
from engine.train.ranks.join import check_node
from launch.zero.build import check_hardware
from tests.train.runs import ROOT, SCRIPT, environment


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs of capability 8.0, and a torch for CUDA 13.0."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 0))
    return monkeypatch


def test_each_rank_needs_a_gpu_of_its_own(two: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        check_gpu(rank, 2)
    with pytest.raises(UserError, match=r"LOCAL_RANK: 3 is one of 4 rank\(s\) on .*, and torch sees 2; start fewer"):
        check_gpu(3, 4)
    two.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task 1
    with pytest.raises(UserError, match="gpu-bind=none"):
        check_gpu(1, 2)


@pytest.mark.parametrize(("capability", "runs"), [((7, 0), False), ((7, 5), True), ((8, 6), True), ((12, 0), False)])
def test_a_gpu_for_which_torch_has_no_code_is_named(
    two: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    two.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    if runs:
        check_gpu(0, 1)
    else:
        with pytest.raises(UserError, match=r"it has no code for NVIDIA X \(sm_\d+\) on .*, only sm_75 sm_80 sm_90;"):
            check_gpu(0, 1)


def test_a_precision_that_a_gpu_would_emulate_is_refused(two: pytest.MonkeyPatch) -> None:
    check_hardware(TrainConfig(precision="bf16"), "cuda")
    two.setattr(torch.cuda, "get_device_capability", lambda index=0: (7, 5))
    with pytest.raises(UserError, match=r"'bf16' needs .* 8\.0 and NVIDIA X .* 7\.5; set fp16 or fp32"):
        check_hardware(TrainConfig(precision="bf16"), "cuda")
    check_precision("fp16")
    two.setattr(torch.cuda, "get_device_capability", lambda index=0: (6, 1))
    with pytest.raises(UserError, match="set fp32"):
        check_precision("fp16")


def test_gpus_that_torch_cannot_see_are_told_before_a_run_goes_to_the_cpus(
    two: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_hidden({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    for hides in ("", "GPU-none"):
        with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES: '{hides}' leaves none of the 2 GPU"):
            check_hidden({"CUDA_VISIBLE_DEVICES": hides}, tmp_path)
    for version, offered in ((12020, "12.2"), (0, "no CUDA")):
        two.setattr(torch._C, "_cuda_getDriverVersion", lambda version=version: version, raising=False)
        with pytest.raises(UserError, match=f"for CUDA 13.0, sees none of the 2 .* driver there offers {offered};"):
            check_hidden({}, tmp_path)
    two.setattr(torch.version, "cuda", None)
    check_hidden({}, tmp_path)


@pytest.mark.parametrize("chosen", [False, True])
def test_who_asks_for_cpus_gets_them(chosen: bool, two: pytest.MonkeyPatch) -> None:
    asked = []
    two.setattr("engine.train.ranks.join.check_hidden", asked.append)
    assert get_accelerator().device_name() == "cpu"
    check_node(chosen)
    assert asked == ([] if chosen else [os.environ])


def test_an_unknown_accelerator_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--debug", f"--output={tmp_path / 'run'}"],
        cwd=ROOT, env=environment() | {"DS_ACCELERATOR": "gpu"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: DS_ACCELERATOR: 'gpu': DS_ACCELERATOR must be one of ")
    assert done.stderr.count("\n") == 1
