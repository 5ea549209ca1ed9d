"""The loss as it is on GPUs: products over a padded vocabulary, the bias in the product, emulated CUDA kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels import decoder_loss, dispatch, linear_cross_entropy, ops
from tests.cuda_emulator.emulated import emulated_kernels
from tests.kernels.cases import FACTOR, FLOOR, error, targets
from tests.kernels.test_ops import CHECKS, DTYPES, copies, decoder, plain

UNIT = 64


class Operators(TorchDispatchMode):
    """Names of the operators that run, views left out."""

    VIEWS = ("t", "slice", "detach", "alias", "view", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True, params=["padded", "as on a GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Padded on a CPU, as it is otherwise; or with the bias in the product and the emulated kernels too."""
    monkeypatch.setattr(dispatch, "class_unit", lambda _: UNIT)
    if request.param == "as on a GPU":
        emulated = emulated_kernels()
        monkeypatch.setitem(dispatch.BACK_ENDS, "cpu", lambda *_: emulated)
        monkeypatch.setattr(dispatch, "adds_bias", lambda _: False)
        monkeypatch.setattr(dispatch, "column_sum", lambda _: emulated)
    return str(request.param)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 64, 1003), (66, 40, 97), (5, 24, 128)])
def test_loss_and_gradients_are_as_exact_as_their_precision(
    shape: tuple[int, int, int], dtype: torch.dtype, chunked: bool
) -> None:
    rows, _, classes = shape
    tensors, target = decoder(*shape, dtype), targets(rows + 1, classes)[1:]
    exact, naive = copies(tensors, torch.float64), copies(tensors, dtype)
    truth, naive_loss = plain(exact, target, 0.1, 3.0), plain(naive, target, 0.1, 3.0)
    budget = 4 * classes * dtype.itemsize if chunked else 1 << 30
    loss = linear_cross_entropy(*tensors, target, label_smoothing=0.1, reduction="mean", logit_bytes=budget)
    assert isinstance(loss, Tensor)
    (loss * 3.0).backward()
    assert error(loss.detach(), truth) <= FACTOR * error(naive_loss, truth) + FLOOR[dtype] / 10
    for ours, theirs, true in zip(tensors, naive, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None and true.grad is not None  # noqa: PT018
        assert ours.grad.shape == ours.shape
        assert ours.grad.is_contiguous()
        assert error(ours.grad, true.grad) <= FACTOR * error(theirs.grad, true.grad) + FLOOR[dtype]


def test_the_padding_stays_zero_and_costs_no_pass_over_the_logits(way: str) -> None:
    hidden, weight, bias = (tensor.detach() for tensor in decoder(6, 24, 97, torch.float32))
    factors = (decoder_loss.padded(weight, 128), decoder_loss.padded(bias, 128))
    target = targets(6, 97)
    with Operators() as seen:
        *_, slope, grad_bias = decoder_loss._loss_and_slope(
            hidden, *factors, target, 97, ignore_index=-100, label_smoothing=0.0, gradient=True
        )
    assert slope.shape == (6, 128)
    assert slope.is_contiguous()
    assert slope[:, 97:].eq(0).all()
    assert slope[:, :97].ne(0).any()
    torch.testing.assert_close(grad_bias, slope[:, :97].sum(0))
    product = "mm" if way == "padded" else "addmm"
    launched = [name for name in seen.names if not name.startswith(("empty", "new_empty"))]
    assert launched == [product, "full", "softmax_cross_entropy_", "sum", "sum"]


def test_a_whole_vocabulary_is_not_copied() -> None:
    weight = torch.ones(128, 8)
    assert decoder_loss.padded(weight, 128) is weight
    assert decoder_loss.padded_classes(weight) == 128


@pytest.mark.parametrize("bias", [True, False])
def test_the_operators_pass_opcheck(bias: bool) -> None:
    hidden, weight, some = decoder(5, 36, 33, torch.float32)
    arguments = (hidden, weight, some if bias else None, targets(5, 33), -100, 0.1, True)
    opcheck(torch.ops.zerobert.linear_cross_entropy.default, arguments, test_utils=CHECKS)
    opcheck(torch.ops.zerobert.chunked_linear_cross_entropy.default, (*arguments, 2), test_utils=CHECKS)


def test_targets_are_checked_on_a_gpu_by_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(logits: Tensor, *_: Any, in_range: Tensor, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        assert in_range.dtype == torch.int32
        return logits, logits, logits

    monkeypatch.setattr(ops, "backend", lambda *_: SimpleNamespace(softmax_cross_entropy_=fused))
    with FakeTensorMode(), Operators() as seen:
        logits = torch.empty(3, 8, device="cuda")
        arguments = (logits, None, torch.empty(3, dtype=torch.int64, device="cuda"), torch.ones((), device="cuda"))
        seen.names.clear()
        ops._softmax_cross_entropy_._init_fn(*arguments, -100, 0.0, True)
    assert seen.names == ["ones", "_assert_async"]
