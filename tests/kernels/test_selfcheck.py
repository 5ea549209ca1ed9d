"""The check that decides whether a GPU's kernels are used passes right kernels and names what wrong ones do."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu, cuda, dispatch, reference
from engine.kernels.cuda.selfcheck import disagreement
from tests.cuda_emulator.emulated import emulated_kernels

CPU = torch.device("cpu")
NAMES = ("softmax_cross_entropy_", "global_norm", "adamw_step_", "lamb_step_", "lamb_moments_", "lamb_apply_")


def changed(**functions: Any) -> SimpleNamespace:
    """Plain torch with some functions replaced."""
    return SimpleNamespace(**{name: getattr(reference, name) for name in NAMES} | functions)


def test_right_kernels_pass() -> None:
    assert disagreement(emulated_kernels(), CPU) is None
    if cpu.available():
        assert disagreement(cpu, CPU) is None


def test_a_wrong_loss_is_named() -> None:
    def wrong(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, hit, grad_bias = reference.softmax_cross_entropy_(*arguments, **options)
        return loss * 1.001, hit, grad_bias

    assert disagreement(changed(softmax_cross_entropy_=wrong), CPU) == (
        "the loss in torch.float32 differs from plain torch by 1.0e-03"
    )


def test_a_kernel_that_does_nothing_is_named() -> None:
    idle = changed(adamw_step_=lambda *_: torch.zeros(()))
    assert "adamw: weights differs" in str(disagreement(idle, CPU))
    halved = changed(lamb_apply_=lambda *_: None)
    assert "lamb in halves: weights differs" in str(disagreement(halved, CPU))


def test_nan_is_no_agreement() -> None:
    broken = changed(global_norm=lambda grad, _: torch.tensor(float("nan")))
    assert "the gradient norm differs from plain torch by nan" in str(disagreement(broken, CPU))


def test_a_failure_to_build_or_launch_is_one_line() -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU\nmore")

    assert disagreement(changed(adamw_step_=fails), CPU) == "CUDA_ERROR_NO_BINARY_FOR_GPU"


@pytest.mark.parametrize("found", [None, "the loss differs"])
def test_the_answer_decides_what_a_gpu_uses(
    found: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch._agrees.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(dispatch, "disagreement", lambda *_: found)
    with caplog.at_level(logging.WARNING):
        chosen = [dispatch.backend(torch.device("cuda", 0)) for _ in range(2)]
    dispatch._agrees.cache_clear()
    assert chosen == [cuda if found is None else reference] * 2
    assert [record.getMessage() for record in caplog.records] == (
        [] if found is None else [f"CUDA kernels: {found}; plain torch runs instead"]
    )
