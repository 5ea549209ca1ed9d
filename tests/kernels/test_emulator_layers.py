"""The CUDA kernels of dropout, residual sum and layer normalisation, run by the emulator, agree with float64 in every
schedule of their threads, and drop what the CPU kernels drop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels import cpu, cuda, dispatch
from engine.kernels.cuda.arguments import WARP
from engine.kernels.cuda.column_sum import sum_partials
from engine.kernels.cuda.kernels import CudaKernels
from engine.kernels.cuda.normalisation import BLOCKS, TEAMS
from engine.kernels.cuda.nvrtc import SOURCES
from engine.kernels.layers import _NormalisedSum, added_norm
from engine.kernels.reference import dropout_factors
from engine.kernels.terms import NO_DROPOUT, Dropout
from tests.cuda_emulator.emulated import SCHEDULES, Emulator, build, emulated_kernels
from tests.cuda_emulator.float64 import error

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: largest relative error: fp32 arithmetic, and in 16 bits two roundings, as the gradient of x is made of the residual's
TOLERANCE = {FP32: 2e-6, BF16: 8e-3, FP16: 1e-3}
INNER, OUTER = Dropout(0.2, 11), Dropout(0.3, 12)
EPS = 1e-12

schedules = pytest.mark.parametrize("schedule", list(SCHEDULES))
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=lambda dtype: str(dtype).removeprefix("torch."))


def guarded(rows: int, width: int, dtype: torch.dtype, seed: int, start: int = 0) -> Tensor:
    """Normal numbers [rows, width] from 16 bytes on, or `start` elements behind, with NaN before and after them."""
    pack = 16 // dtype.itemsize
    first, size = pack + start, rows * width
    buffer = torch.full((first + size + pack,), math.nan, dtype=dtype)
    view = buffer[first : first + size].view(rows, width)
    return view.copy_(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def around(view: Tensor) -> Tensor:
    """What lies before and after a guarded tensor."""
    whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())  # type: ignore[call-overload]
    return torch.cat((whole[: view.storage_offset()], whole[view.storage_offset() + view.numel() :]))


@dataclass
class Case:
    """Inputs of one call, and its results in float64."""

    rows: int
    width: int
    dtype: torch.dtype
    inner: Dropout = NO_DROPOUT
    outer: Dropout = NO_DROPOUT
    residual: bool = True
    bias: bool = True
    elsewhere: bool = False
    """z has a gradient of its own"""
    offset: int = 0
    """elements between 16 bytes and the weight and the bias"""
    inputs: dict[str, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        rows = {"x": True, "residual": self.residual, "grad": True, "grad_z": self.elsewhere}
        self.inputs = {
            name: guarded(self.rows, self.width, self.dtype, seed) if there else None
            for seed, (name, there) in enumerate(rows.items())
        }
        for seed, (name, there) in enumerate({"weight": True, "bias": self.bias}.items()):
            vector = guarded(1, self.width, self.dtype, 10 + seed, self.offset)[0]
            self.inputs[name] = vector if there else None

    def run(self, kernels: Any) -> list[Tensor]:
        """The result, z, and gradients of x, residual, weight and bias; the NaNs around the inputs are still there."""
        given, dropouts = self.inputs, (self.inner, self.outer)
        terms = (given["weight"], given["bias"], EPS, *dropouts)
        out, z, statistics = kernels.layer_norm(given["x"], given["residual"], *terms)
        gradients = kernels.layer_norm_backward(given["grad"], z, terms[0], statistics, *dropouts, given["grad_z"])
        assert all(tensor is None or around(tensor).isnan().all() for tensor in given.values())
        return [out, z, *gradients]

    def exact(self) -> list[Tensor]:
        """The same in float64, from a sum that is rounded as the kernels round it."""
        given = {name: None if tensor is None else tensor.double() for name, tensor in self.inputs.items()}
        numbers = torch.arange(self.rows)
        before, after = (dropout_factors(each, numbers, self.width).double() for each in (self.inner, self.outer))
        z = given["x"] * before + (0.0 if given["residual"] is None else given["residual"])  # type: ignore[operator]
        leaves = [z.to(self.dtype).double(), given["weight"], torch.zeros(self.width).double()]
        leaves[2] = leaves[2] if given["bias"] is None else given["bias"]
        for leaf in leaves:
            leaf.requires_grad_()  # type: ignore[union-attr]
        out = F.layer_norm(leaves[0], (self.width,), *leaves[1:], eps=EPS) * after  # type: ignore[arg-type]
        of_sum, *of_parameters = torch.autograd.grad(out, leaves, given["grad"])  # type: ignore[arg-type]
        of_sum = of_sum if given["grad_z"] is None else of_sum + given["grad_z"]
        return [out.detach(), z, of_sum * before, of_sum, *of_parameters]

    def check(self, kernels: Any) -> None:
        """All results are as near to float64 as the type allows."""
        names = ("result", "z", "gradient of x", "of the residual", "of the weight", "of the bias")
        for name, measured, exact in zip(names, self.run(kernels), self.exact(), strict=True):
            assert measured.dtype == self.dtype, name
            assert error(measured, exact) <= TOLERANCE[self.dtype], name


def widths(dtype: torch.dtype) -> list[int]:
    """For each kernel a row that it fills, and one that leaves some of its threads without a pack."""
    pack = 16 // dtype.itemsize
    packs = sorted({count for team, most in TEAMS for count in (team * most, team * most - 3)})
    return [pack * count for count in (1, *packs)]


WIDTHS = [(dtype, width) for dtype in (FP32, BF16, FP16) for width in widths(dtype)]


@schedules
@pytest.mark.parametrize(("dtype", "width"), WIDTHS, ids=str)
def test_results_and_gradients_agree_with_float64(schedule: str, dtype: torch.dtype, width: int) -> None:
    Case(7, width, dtype, INNER, OUTER).check(emulated_kernels(schedule))


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 33])
@pytest.mark.parametrize("packs", [40, 200], ids=["a warp a row", "a block a row"])
def test_any_number_of_rows(dtype: torch.dtype, rows: int, packs: int) -> None:
    Case(rows, packs * 16 // dtype.itemsize, dtype, INNER, OUTER).check(emulated_kernels("reverse"))


@dtypes
@pytest.mark.parametrize("packs", [40, 200], ids=["a warp a row", "a block a row"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inner": INNER},
        {"outer": OUTER},
        {"residual": False},
        {"residual": False, "outer": OUTER},
        {"bias": False},
        {"offset": 1},
        {"elsewhere": True},
        {"elsewhere": True, "inner": INNER, "outer": OUTER, "bias": False},
        {"elsewhere": True, "residual": False},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_each_use(dtype: torch.dtype, packs: int, options: dict[str, Any]) -> None:
    Case(6, packs * 16 // dtype.itemsize, dtype, **options).check(emulated_kernels())


@pytest.mark.parametrize("packs", [2, 140], ids=["a warp a row", "a block a row"])
def test_more_rows_than_the_blocks_take_at_a_time(packs: int) -> None:
    rows = 2 * BLOCKS * (4 if packs == 2 else 1) + 5
    Case(rows, packs * 4, FP32, INNER, OUTER).check(emulated_kernels("forward"))


def test_without_dropout_one_buffer_serves_as_both_gradients() -> None:
    of_x, of_residual = Case(3, 256, BF16, outer=OUTER).run(emulated_kernels())[2:4]
    assert of_x.data_ptr() == of_residual.data_ptr()


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler for the CPU kernels")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("packs", [96, 200])
def test_the_cpu_kernels_drop_the_same_elements(dtype: torch.dtype, packs: int) -> None:
    case = Case(9, packs * 16 // dtype.itemsize, dtype, INNER, OUTER)
    assert case.inputs["residual"] is not None
    case.inputs["residual"].zero_()
    for ours, theirs in zip(case.run(emulated_kernels())[:3], case.run(cpu)[:3], strict=True):
        share = float((ours == 0).float().mean())
        assert 0.15 < share < 0.35
        assert (ours == 0).equal(theirs == 0)


def test_results_have_the_same_bits_in_every_schedule() -> None:
    for dtype, packs in ((BF16, 96), (FP32, 200)):
        case = Case(21, packs * 16 // dtype.itemsize, dtype, INNER, OUTER)
        first, *others = (case.run(emulated_kernels(schedule)) for schedule in SCHEDULES)
        for other in others:
            assert all(mine.equal(right) for mine, right in zip(first, other, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("packs", [40, 200])
def test_a_row_that_is_not_finite_touches_no_other(bad: float, packs: int) -> None:
    case = Case(5, packs * 4, FP32, INNER, OUTER)
    clean = case.run(emulated_kernels())[:4]
    assert case.inputs["x"] is not None
    case.inputs["x"][2, 1] = bad
    others = [0, 1, 3, 4]
    for before, after in zip(clean, case.run(emulated_kernels())[:4], strict=True):
        assert not after[2].isfinite().all()
        assert after[others].equal(before[others])


def test_rows_far_from_zero_keep_their_variance() -> None:
    case = Case(2, 512, FP32)
    assert case.inputs["x"] is not None
    case.inputs["x"].add_(4096.0)  # the residual, of variance 1, is lost in no sum of squares
    exact = case.exact()
    assert error(case.run(emulated_kernels())[0], exact[0]) <= 1e-3


def test_a_gradient_that_starts_anywhere_or_is_strided_is_copied() -> None:
    case, kernels = Case(5, 64, BF16), emulated_kernels()
    expected = case.run(kernels)
    grad = case.inputs["grad"]
    assert grad is not None
    for other in (guarded(5, 64, BF16, 2, start=1), guarded(5, 64, BF16, 2).T.contiguous().T):
        case.inputs["grad"] = other
        assert other.equal(grad)
        for mine, right in zip(case.run(kernels), expected, strict=True):
            assert mine.equal(right)


@schedules
@pytest.mark.parametrize(("parts", "width"), [(1, 1), (5, 31), (33, 96), (256, 130)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_sum_of_partial_sums(schedule: str, parts: int, width: int, dtype: torch.dtype) -> None:
    partial = guarded(parts, width, FP32, 3)
    total = sum_partials(Emulator(build(SOURCES), schedule), partial, dtype)
    assert error(total, partial.double().sum(0)) <= TOLERANCE[dtype]


def test_launches_and_blocks() -> None:
    emulator, launched = Emulator(build(SOURCES)), []

    def counting(kernel: str, blocks: int, *arguments: Any) -> None:
        launched.append((kernel, blocks))
        emulator(kernel, blocks, *arguments)

    Case(4 * BLOCKS + 1, 8, BF16).run(CudaKernels(counting))
    assert launched == [
        ("layer_norm<bf16, 128, 32, 2>", BLOCKS + 1),
        ("layer_norm_backward<bf16, 128, 32, 2>", BLOCKS),
        ("sum_partials<bf16, 1024>", -(-2 * 8 // WARP)),
    ]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> CudaKernels:
    """The CUDA kernels in the place of the CPU's, for whoever asks `dispatch`."""
    kernels = emulated_kernels()
    monkeypatch.setattr(dispatch, "normalised_sum", lambda *_: kernels)
    return kernels


def test_autograd_through_the_sum_and_the_norm(emulated: CudaKernels) -> None:
    generator = torch.Generator().manual_seed(6)
    drawn = [torch.randn(shape, generator=generator) for shape in ((9, 40), (9, 40), (40,), (40,))]
    grads = [torch.randn(9, 40, generator=generator) for _ in range(2)]
    for biased in (False, True):
        inputs = drawn if biased else drawn[:3]
        ours = [t.clone().requires_grad_() for t in inputs]
        exact = [t.double().requires_grad_() for t in inputs]
        results = added_norm(*ours[:3], ours[3] if biased else None, 1e-5)
        summed = exact[0] + exact[1]
        expected = (summed, F.layer_norm(summed, (40,), *exact[2:], eps=1e-5))
        torch.autograd.backward(results, grads)
        torch.autograd.backward(expected, [grad.double() for grad in grads])
        for mine, right in zip((*results, *ours), (*expected, *exact), strict=True):
            assert error(mine, right) <= TOLERANCE[FP32]
            assert right.grad is None or error(mine.grad, right.grad) <= TOLERANCE[FP32]


def test_autograd_gives_gradients_in_the_parameters_type() -> None:
    leaves = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((9, 64), (9, 64), (64,), (64,))]
    result = _NormalisedSum.apply(*leaves, EPS, INNER, OUTER, emulated_kernels())
    result.sum().backward()  # its gradient is one number, expanded
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [BF16] * 4


def test_the_public_back_end_has_them() -> None:
    assert cuda.layer_norm == cuda.kernels._kernels.layer_norm
    assert cuda.layer_norm_backward == cuda.kernels._kernels.layer_norm_backward
