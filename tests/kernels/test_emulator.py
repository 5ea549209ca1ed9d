"""The CUDA kernels' own sources, run by the emulator, agree with float64 in every schedule of their threads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.cuda import kernels as cuda
from engine.kernels.cuda.nvrtc import SOURCES
from engine.kernels.segments import Segments
from engine.kernels.terms import Adam, Trust
from tests.cuda_emulator.emulated import SCHEDULES, Emulator, EmulatorError, build, emulated_kernels
from tests.cuda_emulator.float64 import State64, cross_entropy64, error, step64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]
#: largest relative error of fp32 arithmetic that is allowed beyond that of the naive computation
TOLERANCE = 1e-6
STEP = Adam(lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-6, step=3)

schedules = pytest.mark.parametrize("schedule", list(SCHEDULES))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def rows(count: int, classes: int, dtype: torch.dtype, start: int = 0) -> Tensor:
    """[count, classes] logits whose first row starts `start` elements into an aligned buffer, NaN all around."""
    generator = torch.Generator().manual_seed(classes)
    buffer = torch.full((start + count * (classes + 1) + 1,), math.nan, dtype=dtype)
    view = buffer[start : start + count * (classes + 1)].view(count, classes + 1)[:, :classes]
    return view.copy_(torch.randn(count, classes, generator=generator) * 3)


def outside(logits: Tensor) -> Tensor:
    """The elements of a view's buffer that don't belong to the view."""
    mask = torch.ones(logits.untyped_storage().nbytes() // logits.element_size(), dtype=torch.bool)
    mask.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(False)
    whole = torch.empty(0, dtype=logits.dtype).set_(logits.untyped_storage())  # type: ignore[call-overload]
    return whole[mask]


def score(
    schedule: str, logits: Tensor, target: Tensor, smoothing: float = 0.0, gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """The emulated loss and hit, with gradients times 0.5 in place of the logits."""
    kernels = emulated_kernels(schedule)
    options = {"ignore_index": -100, "label_smoothing": smoothing, "gradient": gradient}
    return kernels.softmax_cross_entropy_(logits, None, target, torch.tensor(0.5), **options)[:2]


@schedules
@dtypes
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [1, 7, 1023, 30522])
def test_loss_and_gradient_are_as_near_to_float64_as_naive_torch(
    schedule: str, dtype: torch.dtype, smoothing: float, classes: int
) -> None:
    logits = rows(3, classes, dtype, start=1)
    target = torch.tensor([classes // 2, classes - 1, -100])
    exact, slope = cross_entropy64(logits, target, smoothing)
    naive = logits.clone()
    options = {"ignore_index": -100, "label_smoothing": smoothing, "gradient": True}
    naive_loss, hits, _ = reference.softmax_cross_entropy_(naive, None, target, torch.tensor(0.5), **options)

    loss, hit = score(schedule, logits, target, smoothing)

    assert error(loss, exact) <= error(naive_loss, exact) + TOLERANCE
    if classes > 1:
        assert error(logits, slope * 0.5) <= error(naive, slope * 0.5) + TOLERANCE
    assert float(logits[2].abs().max()) == 0.0
    assert hit.equal(hits)
    assert outside(logits).isnan().all()


@dtypes
@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("classes", [1001, 16384, 33000, 70001])
def test_rows_may_start_at_any_element(dtype: torch.dtype, start: int, classes: int) -> None:
    logits = rows(1, classes, dtype, start)
    exact, slope = cross_entropy64(logits, torch.tensor([3]), 0.1)
    loss, _ = score("reverse", logits, torch.tensor([3]), 0.1)
    assert error(loss, exact) <= 2 * TOLERANCE
    assert error(logits, slope * 0.5) <= torch.finfo(dtype).eps
    assert outside(logits).isnan().all()


@pytest.mark.parametrize("classes", [1000, 12000])
def test_extreme_logits_keep_their_precision(classes: int) -> None:
    logits = torch.full((3, classes), -1e4)
    logits[0, 5], logits[1] = 1e4, 1e4
    target = torch.tensor([5, 0, 2])
    exact, slope = cross_entropy64(logits, target, 0.1)
    loss, hit = score("random", logits, target, 0.1)
    assert error(loss, exact) <= TOLERANCE
    assert error(logits, slope * 0.5) <= TOLERANCE
    assert hit.tolist() == [True, True, False]


@pytest.mark.parametrize("classes", [1000, 12000])
def test_infinite_and_nan_logits_do_what_torch_does(classes: int) -> None:
    logits = rows(4, classes, torch.float32)
    logits[0, :900], logits[1, 3], logits[2, 3], logits[3] = -math.inf, math.inf, math.nan, -math.inf
    target = torch.full((4,), 950)
    exact, slope = cross_entropy64(logits, target, 0.0)
    loss, hit = score("random", logits, target)
    assert loss.isfinite().tolist() == exact.isfinite().tolist() == [True, False, False, False]
    assert error(loss[:1], exact[:1]) <= TOLERANCE
    assert error(logits[0], slope[0] * 0.5) <= TOLERANCE
    assert logits[0, :900].eq(0).all()
    assert logits[1:].isnan().any(-1).all()
    assert not hit[2:].any()


@pytest.mark.parametrize("classes", [1000, 12000])
def test_the_first_of_equal_maxima_is_the_prediction(classes: int) -> None:
    logits = torch.zeros(2, classes)
    logits[:, [40, 70]] = 1.0
    assert score("random", logits, torch.tensor([40, 70]))[1].tolist() == [True, False]


@pytest.mark.parametrize("classes", [1000, 12000])
def test_a_prediction_is_one_with_an_infinite_logit_but_not_beside_nan(classes: int) -> None:
    logits, target = rows(3, classes, torch.float32), torch.tensor([950, 950, 950])
    logits[:2, 950], logits[1, 3], logits[2, 949:951] = math.inf, math.nan, 50.0
    assert score("random", logits, target)[1].tolist() == [True, False, False]


@schedules
@pytest.mark.parametrize("wild", [-1, 1000, 2**40, -(2**62)])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_target_out_of_range_makes_its_row_nan_and_touches_no_other(schedule: str, wild: int, gradient: bool) -> None:
    logits = rows(3, 1000, torch.bfloat16)
    before = logits.clone()
    loss, hit = score(schedule, logits, torch.tensor([1, wild, 1]), gradient=gradient)
    assert loss.isnan().tolist() == [False, True, False]
    assert not hit[1]
    if gradient:
        assert logits.isnan().all(-1).tolist() == [False, True, False]
    else:
        assert logits.equal(before)
    assert outside(logits).isnan().all()


@pytest.mark.parametrize(("target", "flag"), [([1, -100, 0], 1), ([1, 1000, -1], 0), ([-100, 2**40, 0], 0)])
def test_a_flag_tells_of_a_target_out_of_range(target: list[int], flag: int) -> None:
    in_range = torch.ones((), dtype=torch.int32)
    options: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.0, "gradient": True, "in_range": in_range}
    logits, scale = rows(3, 1000, torch.bfloat16), torch.tensor(1.0)
    emulated_kernels().softmax_cross_entropy_(logits, None, torch.tensor(target), scale, **options)
    assert int(in_range) == flag


def test_no_rows_are_no_launch() -> None:
    loss, hit = score("forward", torch.empty(0, 30522), torch.empty(0, dtype=torch.int64))
    assert loss.shape == hit.shape == (0,)


class Optimizer:
    """Flat buffers with segments of odd lengths at odd offsets, and NaN in the gaps between them."""

    lengths = (1, 3, 7, 1023, 40_000, 5000, 0)

    def __init__(self, grad: torch.dtype, copy: torch.dtype | None, start: int = 0) -> None:
        count = len(self.lengths)
        offsets = [start + 5 * index + sum(self.lengths[:index]) for index in range(count)]
        decays, trusted = [0.0 if index in (1, 3) else 0.01 for index in range(count)], [i != 5 for i in range(count)]
        self.segments = Segments.build(offsets, self.lengths, decays, trusted)
        self.inside = torch.zeros(offsets[-1] + self.lengths[-1] + 5, dtype=torch.bool)
        for part in self.segments.ranges():
            self.inside[part] = True
        self.param, self.exp_avg = self.filled(0.05), self.filled(1e-3)
        self.exp_avg_sq, self.grad = self.filled(1e-3).square(), self.filled(0.5).to(grad)
        self.copy = None if copy is None else torch.full(self.inside.shape, math.nan, dtype=copy)
        self.adam, self.scale, self.trust = STEP, torch.tensor(0.25), Trust()

    def filled(self, size: float) -> Tensor:
        """Random values of standard deviation `size` in the segments."""
        generator = torch.Generator().manual_seed(int(size * 1e6))
        values = torch.randn(self.inside.shape, generator=generator) * size
        return values.where(self.inside, math.nan)

    def exact(self) -> State64:
        """The state in float64."""
        return State64(self.param.double(), self.exp_avg.double(), self.exp_avg_sq.double())

    def flats(self) -> tuple[Tensor, ...]:
        """The buffers that every operator takes."""
        return (self.param, self.grad, self.exp_avg, self.exp_avg_sq)

    def step(self, kernels: Any, lamb: bool) -> tuple[Tensor, Tensor | None]:
        """One step: nonfinite, and LAMB's ratios."""
        arguments = (*self.flats(), self.copy, self.segments, self.adam, self.scale)
        return kernels.lamb_step_(*arguments, self.trust) if lamb else (kernels.adamw_step_(*arguments), None)

    def exact_step(self, exact: State64, lamb: bool) -> Tensor:
        """The same in float64; the ratios."""
        return step64(exact, self.grad, self.segments, self.adam, self.scale, self.trust if lamb else None)

    def check(self, exact: State64) -> None:
        """The state and the copy agree with float64, and the gaps are as they were."""
        for name in ("param", "exp_avg", "exp_avg_sq"):
            measured, wanted = getattr(self, name), getattr(exact, name)
            assert measured.isnan().equal(~self.inside), name
            for part in self.segments.ranges():
                assert error(measured[part], wanted[part]) <= TOLERANCE, name
        if self.copy is not None:
            assert self.copy[self.inside].equal(self.param[self.inside].to(self.copy.dtype))
            assert self.copy[~self.inside].isnan().all()


@schedules
@dtypes
@pytest.mark.parametrize("copy", [None, *LOW], ids=["none", "bf16", "fp16"])
@pytest.mark.parametrize("start", [0, 3])
def test_adamw_agrees_with_float64(schedule: str, dtype: torch.dtype, copy: torch.dtype | None, start: int) -> None:
    run = Optimizer(dtype, copy, start)
    exact, gradients = run.exact(), run.grad.clone()
    run.exact_step(exact, lamb=False)
    nonfinite, _ = run.step(emulated_kernels(schedule), lamb=False)
    run.check(exact)
    assert int(nonfinite) == 0
    assert run.grad.view(torch.uint8).equal(gradients.view(torch.uint8))


@schedules
@dtypes
@pytest.mark.parametrize("trust", [Trust(), Trust(nvlamb=True), Trust(clamp=0.5)], ids=["plain", "nvlamb", "clamp"])
def test_lamb_agrees_with_float64(schedule: str, dtype: torch.dtype, trust: Trust) -> None:
    run = Optimizer(dtype, torch.bfloat16, start=3)
    run.trust = trust
    exact, gradients = run.exact(), run.grad.clone()
    ratios = run.exact_step(exact, lamb=True)
    nonfinite, ratio = run.step(emulated_kernels(schedule), lamb=True)
    run.check(exact)
    assert ratio is not None
    assert error(ratio, ratios) <= TOLERANCE
    assert int(nonfinite) == 0
    assert run.grad.view(torch.uint8).equal(gradients.view(torch.uint8))


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("misaligned", ["grad", "copy", "exp_avg"])
def test_buffers_that_no_common_boundary_aligns_are_right_too(misaligned: str, bias_correction: bool) -> None:
    run = Optimizer(torch.bfloat16, torch.float16)
    shifted = torch.empty(len(run.inside) + 1, dtype=getattr(run, misaligned).dtype)[1:]
    setattr(run, misaligned, shifted.copy_(getattr(run, misaligned)))
    run.adam = replace(STEP, bias_correction=bias_correction)
    exact = run.exact()
    run.exact_step(exact, lamb=True)
    run.step(emulated_kernels("reverse"), lamb=True)
    run.check(exact)


@schedules
@dtypes
def test_the_halves_of_a_lamb_step_are_the_whole(schedule: str, dtype: torch.dtype) -> None:
    whole, halves, kernels = Optimizer(dtype, None, 3), Optimizer(dtype, None, 3), emulated_kernels(schedule)
    _, ratio = whole.step(kernels, lamb=True)
    assert ratio is not None
    options = (halves.segments, halves.adam, halves.scale)
    nonfinite, squares = kernels.lamb_moments_(*halves.flats(), *options)
    found = reference.trust_ratios(squares, halves.segments.scaled(halves.trust), halves.trust)
    assert error(found, ratio.double()) <= TOLERANCE
    kernels.lamb_apply_(*halves.flats(), None, *options, ratio, nonfinite)
    assert halves.param[halves.inside].equal(whole.param[whole.inside])


@schedules
@pytest.mark.parametrize("lamb", [False, True], ids=["adamw", "lamb"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_element_with_a_gradient_that_is_not_finite_stays_as_it_is(schedule: str, lamb: bool, bad: float) -> None:
    run = Optimizer(torch.bfloat16, torch.bfloat16)
    wrong = torch.tensor([run.segments.ranges()[0].start, run.segments.ranges()[4].start + 33_000])
    kept = torch.ones_like(run.inside).index_fill(0, wrong, False) & run.inside
    run.grad[wrong] = bad
    before = run.exact()
    kernels, want = emulated_kernels(schedule), Optimizer(torch.bfloat16, torch.bfloat16)
    want.grad = run.grad.clone()
    nonfinite, _ = run.step(kernels, lamb)
    want.step(reference, lamb)
    assert int(nonfinite) == 1
    for field in ("param", "exp_avg", "exp_avg_sq"):
        assert getattr(run, field)[wrong].double().equal(getattr(before, field)[wrong])
        assert error(getattr(run, field)[kept], getattr(want, field)[kept].double()) <= TOLERANCE


@dtypes
@pytest.mark.parametrize("start", [0, 3])
def test_the_global_norm_agrees_with_float64(dtype: torch.dtype, start: int) -> None:
    run = Optimizer(dtype, None, start)
    norm = emulated_kernels().global_norm(run.grad, run.segments)
    assert error(norm, run.grad[run.inside].double().norm()) <= TOLERANCE


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_global_norm_passes_on_what_is_not_finite(bad: float) -> None:
    run = Optimizer(torch.float32, None)
    run.grad[run.segments.ranges()[5].start] = bad
    norm = emulated_kernels().global_norm(run.grad, run.segments)
    assert norm.isnan() if math.isnan(bad) else norm.isinf()


def test_norms_and_ratios_have_the_same_bits_in_every_schedule() -> None:
    found = set()
    for schedule in SCHEDULES:
        run, kernels = Optimizer(torch.float32, None), emulated_kernels(schedule)
        norm = kernels.global_norm(run.grad, run.segments)
        _, ratio = run.step(kernels, lamb=True)
        assert ratio is not None
        found.add((float(norm), tuple(ratio.tolist()), tuple(run.param[run.inside].tolist())))
    assert len(found) == 1


def test_no_segments_are_no_step_and_norm_0() -> None:
    empty, none = torch.empty(0), Segments.build([], [], [])
    terms, kernels = (none, STEP, torch.tensor(1.0)), emulated_kernels()
    assert float(kernels.global_norm(empty, none)) == 0.0
    assert int(kernels.adamw_step_(empty, empty, empty, empty, None, *terms)) == 0
    assert kernels.lamb_step_(empty, empty, empty, empty, None, *terms, Trust())[1].shape == (0,)
    assert kernels.lamb_moments_(empty, empty, empty, empty, *terms)[1].shape == (0, 2)


def test_a_step_takes_as_many_launches_for_seven_tensors_as_for_one() -> None:
    emulator, launched = Emulator(build(SOURCES)), []

    def counting(kernel: str, *arguments: Any) -> None:
        launched.append(kernel.split("<")[0])
        emulator(kernel, *arguments)

    run, kernels = Optimizer(torch.float32, torch.bfloat16), cuda.CudaKernels(counting)
    run.step(kernels, lamb=False)
    assert launched == ["adamw"]
    launched.clear()
    run.step(kernels, lamb=True)
    assert launched == ["lamb_moments", "lamb_ratios", "lamb_update"]


def test_the_emulator_knows_every_kernel_that_may_be_launched() -> None:
    library = build(SOURCES)
    assert [name for name in cuda.all_kernels() if not library.has_kernel(name.encode())] == []


def test_an_unknown_kernel_is_an_error() -> None:
    with pytest.raises(EmulatorError, match="no kernel nothing<3>"):
        Emulator(build(SOURCES))("nothing<3>", 1, 32, [], torch.device("cpu"))


class LargeOptimizer(Optimizer):
    """One long segment."""

    lengths = (40_000_000,)


@pytest.mark.slow
@pytest.mark.parametrize("lamb", [False, True], ids=["adamw", "lamb"])
def test_a_segment_of_forty_million_elements_agrees_with_float64(lamb: bool) -> None:
    run = LargeOptimizer(torch.bfloat16, torch.bfloat16)
    exact = run.exact()
    run.exact_step(exact, lamb)
    run.step(emulated_kernels("forward"), lamb)
    run.check(exact)
