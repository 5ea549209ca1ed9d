"""The operators: registered soundly, right in value and gradient whole and in chunks, strict about targets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F  # noqa: N812

from engine.kernels import Segments, dispatch, linear_cross_entropy, select
from tests.conftest import ROOT
from tests.kernels.cases import FACTOR, FLOOR, STEP, error, logits, optimizer_buffers, targets

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["auto", "reference"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    select(request.param)
    yield
    select("auto")


def decoder(rows: int, hidden: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.5).to(dtype).requires_grad_()

    return draw(rows, hidden), draw(classes, hidden), draw(classes)


def copies(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]


def plain(tensors: list[Tensor], target: Tensor, smoothing: float, factor: float) -> Tensor:
    """Torch's own loss (fp32 softmax), with gradients of `factor` times it."""
    x = F.linear(*tensors)
    x = x if x.dtype == torch.float64 else x.float()
    loss = F.cross_entropy(x, target, label_smoothing=smoothing)
    (loss * factor).backward()
    return loss.detach()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 36, 30522), (7, 64, 1003), (103, 1024, 97)])
def test_loss_and_gradients_are_as_exact_as_their_precision(
    shape: tuple[int, int, int], dtype: torch.dtype, chunked: bool, smoothing: float
) -> None:
    rows, _, classes = shape
    tensors, target = decoder(*shape, dtype), targets(rows + 1, classes)[1:]
    exact, naive = copies(tensors, torch.float64), copies(tensors, dtype)
    truth, naive_loss = plain(exact, target, smoothing, 3.0), plain(naive, target, smoothing, 3.0)
    budget = 5 * classes * dtype.itemsize if chunked else 1 << 30
    options = {"label_smoothing": smoothing, "reduction": "mean", "logit_bytes": budget}
    loss = linear_cross_entropy(*tensors, target, **options)  # type: ignore[arg-type]
    assert isinstance(loss, Tensor)
    assert loss.dtype == torch.float32
    (loss * 3.0).backward()
    assert error(loss.detach(), truth) <= FACTOR * error(naive_loss, truth) + 1e-6
    for ours, theirs, true in zip(tensors, naive, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None and true.grad is not None  # noqa: PT018
        assert ours.grad.dtype == dtype
        assert error(ours.grad, true.grad) <= FACTOR * error(theirs.grad, true.grad) + FLOOR[dtype]


@pytest.mark.parametrize("rows", [0, 1, 7, 1023])
def test_any_number_of_rows_works(rows: int) -> None:
    tensors, target = decoder(rows, 36, 50, torch.float32), targets(rows, 50)
    loss, hits = linear_cross_entropy(*tensors, target, return_hits=True)
    loss.backward()
    x = F.linear(*tensors).detach()
    torch.testing.assert_close(loss.detach(), F.cross_entropy(x, target, reduction="sum"), rtol=1e-5, atol=1e-5)
    assert int(hits) == int((x.argmax(-1) == target).sum())
    assert hits.dtype == torch.int64
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in tensors)


def test_small_fp16_slopes_survive_a_loss_scale() -> None:
    tensors, target = decoder(4, 36, 30522, torch.float16), torch.tensor([1, 2, 3, 4])
    exact = copies(tensors, torch.float64)
    plain(exact, target, 0.0, 1024.0)
    loss = linear_cross_entropy(*tensors, target, reduction="mean")
    assert isinstance(loss, Tensor)
    (loss * 1024.0).backward()
    bias, true = tensors[2].grad, exact[2].grad
    assert bias is not None
    assert true is not None
    seen = true > 256e-6  # probabilities from 1e-6, which fp16 alone would keep to 3%
    assert ((bias.double() - true)[seen].abs() <= 1e-2 * true[seen]).all()


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_no_gradients_are_made_without_need(budget: int) -> None:
    hidden, weight, bias = decoder(6, 36, 50, torch.float32)
    target = targets(6, 50)
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, bias, target, logit_bytes=budget)
    assert isinstance(quiet, Tensor)
    assert not quiet.requires_grad
    frozen = linear_cross_entropy(hidden, weight.detach(), None, target, logit_bytes=budget)
    assert isinstance(frozen, Tensor)
    frozen.backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_a_target_out_of_range_is_refused(wrong: int, budget: int) -> None:
    target = torch.tensor([3, wrong, 0])
    with pytest.raises(IndexError, match=f"target {wrong} is out of range for 50 classes"):
        linear_cross_entropy(*decoder(3, 36, 50, torch.float32), target, logit_bytes=budget)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def test_the_row_operator_passes_opcheck() -> None:
    for bias in (None, torch.ones(33)):
        arguments = (logits("normal", 5, 33, torch.float32), bias, targets(5, 33), torch.ones(()), -100, 0.1, True)
        opcheck(torch.ops.zerobert.softmax_cross_entropy_.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_operators_pass_opcheck(bias: bool) -> None:
    hidden, weight, some = decoder(5, 36, 33, torch.float32)
    arguments = (hidden, weight, some if bias else None, targets(5, 33), -100, 0.1, True)
    opcheck(torch.ops.zerobert.linear_cross_entropy.default, arguments, test_utils=CHECKS)
    opcheck(torch.ops.zerobert.chunked_linear_cross_entropy.default, (*arguments, 2), test_utils=CHECKS)


@pytest.mark.parametrize("copy", [None, torch.bfloat16])
def test_the_optimizer_operators_pass_opcheck(copy: torch.dtype | None) -> None:
    table = Segments.build([0, 4], [3, 90], [0.1, 0.0])
    low = None if copy is None else torch.zeros(100, dtype=copy)
    buffers, terms = optimizer_buffers(100, torch.float32).values(), (table.tensors(), STEP.pack(), torch.ones(()))
    found = (torch.ones(2), torch.zeros((), dtype=torch.int32))
    opcheck(torch.ops.zerobert.adamw_step_.default, (*buffers, low, *terms), test_utils=CHECKS)
    opcheck(torch.ops.zerobert.lamb_step_.default, (*buffers, low, *terms, 10.0, True), test_utils=CHECKS)
    opcheck(torch.ops.zerobert.lamb_moments_.default, (*buffers, *terms), test_utils=CHECKS)
    opcheck(torch.ops.zerobert.lamb_apply_.default, (*buffers, low, *terms, *found), test_utils=CHECKS)
    opcheck(torch.ops.zerobert.global_norm.default, (list(buffers)[1], table.tensors()), test_utils=CHECKS)


def test_the_choice_of_kernels_is_obeyed(request: pytest.FixtureRequest) -> None:
    expected = "reference" if request.node.callspec.params["_kernels"] == "reference" else "cpu"
    assert expected in dispatch.backend(torch.device("cpu"), "loss").__name__.split(".")


def test_the_public_door_does_not_load_torch() -> None:
    code = "import sys, engine.kernels, engine.optim; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
