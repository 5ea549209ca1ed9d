"""What a run asks of CUDA. No GPU can be here: the environment and the device's type stand in for one."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from engine.errors import UserError
from engine.kernels import dispatch
from engine.train.fit import is_out_of_memory
from engine.train.ranks.device import check, prepare, settle
from engine.train.ranks.join import collective_timeout
from tests.train.runs import SMALL, execute


@pytest.fixture
def numerics() -> Iterator[None]:
    """Puts back what a test changes of torch."""
    precision, attention = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(attention)


def test_the_environment_is_completed_and_a_users_values_stay() -> None:
    env: dict[str, str] = {}
    prepare(env, deterministic=True)
    assert env == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    own = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    env = dict(own)
    prepare(env, deterministic=True)
    assert env == own
    env = {"DS_ACCELERATOR": "cpu"}
    prepare(env, deterministic=True)
    assert env == {"DS_ACCELERATOR": "cpu"}


def test_a_workspace_that_contradicts_determinism_is_refused_on_gpus() -> None:
    env = {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    check(env, deterministic=True, accelerator="cpu")
    check(env, deterministic=False, accelerator="cuda")
    check({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, deterministic=True, accelerator="cuda")
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG: ':0:0' contradicts train\.deterministic"):
        check(env, deterministic=True, accelerator="cuda")


def test_only_a_gpu_changes_how_torch_multiplies(numerics: None) -> None:
    settle(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    settle(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "high"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_collectives_outlast_the_watchdog() -> None:
    assert collective_timeout(1800.0) == timedelta(minutes=35)
    assert collective_timeout(None) > timedelta(days=1)


def test_cublas_without_memory_is_out_of_memory() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


def test_kernels_and_determinism_are_settled_before_a_micro_batch_is_tried(store: Path, tmp_path: Path) -> None:
    options = ["--train.micro_batch=auto", "--train.deterministic=true", "--train.kernels=fused", "--train.steps=1"]
    options += [f"--output={tmp_path / 'run'}", f"--data.path={store}", *SMALL]
    done = execute("tests/train/ranks/order_worker.py", *options, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("KERNELS", "TRIAL"))]
    assert told == ["KERNELS True fused", "TRIAL True fused", "KERNELS True fused"]


def test_an_agreement_on_one_device_keeps_that_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an offloaded optimizer the model is on a GPU and the step on the CPU."""
    monkeypatch.setattr(dispatch, "_withheld", frozenset({("cuda", "loss"), ("cpu", "lamb")}))
    monkeypatch.setitem(dispatch.BACK_ENDS, "cpu", lambda device, family: None if family == "norm" else dispatch.cpu)
    dispatch.agree(torch.device("cpu"))
    assert dispatch._withheld == {("cuda", "loss"), ("cpu", "norm")}
