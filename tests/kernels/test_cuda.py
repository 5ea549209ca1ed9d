"""The CUDA kernels on a GPU: against the plain-torch reference, on torch's streams, and without waiting for the host.

Skipped where there is no GPU; the emulator's tests and the compilation's run the same sources everywhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.cuda import kernels as cuda
from engine.kernels.cuda.selfcheck import FAMILIES, disagreement
from tests.cuda_emulator.float64 import error
from tests.kernels.test_emulator import TOLERANCE, Optimizer, rows

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: the CUDA kernels are only compiled and emulated here"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.1, "gradient": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 7, 1023, 30522, 119547])
def test_cross_entropy_agrees_with_float64(dtype: torch.dtype, classes: int) -> None:
    logits = rows(64, classes, dtype, start=1).cuda()
    target = torch.randint(0, classes, (64,), device="cuda")
    target[3] = -100
    exact = logits.double()
    scale = torch.tensor([1.0, 0.5]).cuda()
    wanted, hits, _ = reference.softmax_cross_entropy_(logits.clone(), None, target, scale[0], **OPTIONS)
    loss, hit, _ = cuda.softmax_cross_entropy_(logits, None, target, scale[1], **OPTIONS)
    exact.requires_grad_()
    kept = torch.nn.functional.cross_entropy(exact, target, label_smoothing=0.1, reduction="none")
    (slope,) = torch.autograd.grad(kept.sum() * 0.5, exact)
    assert error(loss, kept.detach()) <= error(wanted, kept.detach()) + TOLERANCE
    assert error(logits, slope) <= torch.finfo(dtype).eps
    assert hit.equal(hits)


def on_gpu(run: Optimizer) -> Optimizer:
    """The same buffers on the GPU."""
    for name in ("param", "grad", "exp_avg", "exp_avg_sq", "copy", "inside"):
        value = getattr(run, name)
        setattr(run, name, value if value is None else value.cuda())
    run.segments = type(run.segments).from_tensors([table.cuda() for table in run.segments.tensors()])
    run.scale = run.scale.cuda()
    return run


@pytest.mark.parametrize("grad", DTYPES, ids=str)
@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lamb", [False, True], ids=["adamw", "lamb"])
def test_a_step_agrees_with_the_reference(grad: torch.dtype, copy: torch.dtype | None, lamb: bool) -> None:
    run, want = on_gpu(Optimizer(grad, copy, start=3)), Optimizer(grad, copy, start=3)
    run.step(cuda, lamb)
    want.step(reference, lamb)
    for field in ("param", "exp_avg", "exp_avg_sq"):
        measured: Tensor = getattr(run, field).cpu()[want.inside]
        assert error(measured, getattr(want, field)[want.inside].double()) <= TOLERANCE, field
    if copy is not None:
        assert run.copy[run.inside].equal(run.param[run.inside].to(copy))  # type: ignore[index]
    assert run.param[~run.inside].isnan().all()


def test_norms_and_steps_have_the_same_bits_every_time() -> None:
    found = set()
    for _ in range(3):
        run = on_gpu(Optimizer(torch.bfloat16, torch.bfloat16))
        norm = cuda.global_norm(run.grad, run.segments)
        run.step(cuda, lamb=True)
        found.add((float(norm), tuple(run.param[run.inside].tolist())))
    assert len(found) == 1


def test_kernels_run_on_the_current_stream() -> None:
    stream, run = torch.cuda.Stream(), on_gpu(Optimizer(torch.float32, None))
    wanted = run.grad[run.inside].norm()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on this stream, so a kernel on another would run before the change below
        run.grad.mul_(2)
        norm = cuda.global_norm(run.grad, run.segments)
    stream.synchronize()
    assert error(norm.cpu(), (2 * wanted).double().cpu()) <= TOLERANCE


def test_the_host_never_waits() -> None:
    run = on_gpu(Optimizer(torch.bfloat16, torch.bfloat16))
    logits, target = rows(4, 30522, torch.bfloat16).cuda(), torch.zeros(4, dtype=torch.int64, device="cuda")
    scale = torch.tensor(1.0).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.softmax_cross_entropy_(logits, None, target, scale, **OPTIONS)
        run.step(cuda, lamb=True)
        run.step(cuda, lamb=False)
        cuda.global_norm(run.grad, run.segments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_at_the_start_of_a_run_passes() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert [disagreement(cuda, device, family) for family in FAMILIES] == [None] * len(FAMILIES)
