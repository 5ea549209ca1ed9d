"""The C++ kernels and plain torch against float64; the build survives what a cluster does to it."""

from __future__ import annotations

import fcntl
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engine.kernels import cpu, reference
from engine.kernels.cache import cache_folder
from engine.kernels.cpu import library as cpu_library
from engine.kernels.terms import Trust
from tests.conftest import ROOT
from tests.kernels.cases import (
    FACTOR,
    FLOOR,
    STEP,
    adam_truth,
    cross_entropy_truth,
    error,
    logits,
    optimizer_buffers,
    segments,
    targets,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: instruction sets that this machine has, by the options they are built with
MACHINES = [(), *(f for n, f in cpu_library.MACHINES.items() if torch.backends.cpu.get_cpu_capability() >= n)]
MACHINES = MACHINES if "AVX" in torch.backends.cpu.get_cpu_capability() else [()]
ONE = torch.ones(())
#: builds that only have to be builds are short ones
UNOPTIMISED = ("-O0",)


@pytest.fixture(params=["reference", *MACHINES], ids=lambda p: p if isinstance(p, str) else " ".join(p) or "default")
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Plain torch, then the library built for each instruction set."""
    if request.param == "reference":
        yield reference
        return
    if not cpu.available():
        pytest.skip("no C++ compiler")
    lib = cpu_library.load(cpu_library.build(request.param, cache_folder()))
    monkeypatch.setattr(cpu_library, "library", lambda: lib)
    yield cpu


def check_cross_entropy(
    kernels: ModuleType, kind: str, rows: int, classes: int, dtype: torch.dtype, smoothing: float, biased: bool
) -> None:
    x, target = logits(kind, rows, classes, dtype), targets(rows, classes)
    bias = torch.randn(classes, generator=torch.Generator().manual_seed(classes)).to(dtype) if biased else None
    moved = x.float() if bias is None else x.float() + bias.float()
    loss_true, grad_true = cross_entropy_truth(moved, target, smoothing, torch.float64)
    loss_naive, grad_naive = cross_entropy_truth(moved, target, smoothing, torch.float32)
    best = moved.argmax(-1)
    loss, hit, grad_bias = kernels.softmax_cross_entropy_(
        x, bias, target, ONE * 2, ignore_index=-100, label_smoothing=smoothing, gradient=True
    )
    assert error(loss, loss_true) <= FACTOR * error(loss_naive, loss_true) + FLOOR[torch.float32]
    bound = FACTOR * error((grad_naive * 2).to(dtype), grad_true * 2) + FLOOR[torch.float32]
    assert error(x, grad_true * 2) <= bound
    assert torch.equal(hit, (best == target) & (target != -100))
    assert grad_bias.shape == (classes if biased else 0,)
    if biased:
        assert error(grad_bias, grad_true.sum(0) * 2) <= FLOOR[torch.float32] * max(1, rows)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "extreme", "equal", "steep"])
def test_cross_entropy_is_as_exact_as_its_precision(
    kernels: ModuleType, kind: str, dtype: torch.dtype, smoothing: float, biased: bool
) -> None:
    check_cross_entropy(kernels, kind, 7, 1003, dtype, smoothing, biased)


@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (1, 1), (1, 30522), (7, 3), (1023, 36)])
def test_cross_entropy_takes_odd_sizes(kernels: ModuleType, rows: int, classes: int) -> None:
    check_cross_entropy(kernels, "normal", rows, classes, torch.bfloat16, 0.1, biased=True)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_stays_alone(kernels: ModuleType, bad: float) -> None:
    x, target = torch.zeros(3, 40), torch.tensor([0, 1, 0])
    x[1, 7] = bad
    options = {"ignore_index": -100, "label_smoothing": 0.0, "gradient": True}
    loss, hit, _ = kernels.softmax_cross_entropy_(x, None, target, ONE, **options)
    assert loss.isnan().tolist() == [False, True, False]
    assert hit.tolist() == [True, False, True]
    assert x[[0, 2]].isfinite().all()
    assert not x[1].isfinite().any()


def test_rows_may_be_strided_and_logits_stay_without_a_gradient(kernels: ModuleType) -> None:
    wide = logits("normal", 6, 50, torch.float32)
    before, x, target = wide.clone(), wide[:, 3:44], targets(6, 41)
    truth, gradient = cross_entropy_truth(x, target, 0.0, torch.float64)
    options = {"ignore_index": -100, "label_smoothing": 0.0}
    loss, *_ = kernels.softmax_cross_entropy_(x, None, target, ONE, **options, gradient=False)
    assert torch.equal(wide, before)
    assert error(loss, truth) < 1e-6
    kernels.softmax_cross_entropy_(x, None, target, ONE, **options, gradient=True)
    assert error(x, gradient) < 1e-6
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, 44:], before[:, 44:])


@pytest.mark.parametrize("lamb", [False, True], ids=["adamw", "lamb"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float16])
def test_a_step_is_as_exact_as_fp32(
    kernels: ModuleType, lamb: bool, dtype: torch.dtype, copy_dtype: torch.dtype | None
) -> None:
    table, size = segments([1, 3, 70_001, 36, 2048])
    buffers = optimizer_buffers(size, dtype)
    truth = adam_truth(buffers, table, 0.25, lamb=lamb)
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    copy = None if copy_dtype is None else torch.zeros(size, dtype=copy_dtype)
    options = (STEP, ONE * 0.25)
    if lamb:
        flag, ratio = kernels.lamb_step_(*buffers.values(), copy, table, *options, Trust(nvlamb=True))
        assert error(ratio, truth["ratio"]) < 1e-6
    else:
        flag = kernels.adamw_step_(*buffers.values(), copy, table, *options)
    assert int(flag) == 0
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert error(buffers[name], truth[name]) < 1e-6
    assert torch.equal(buffers["grad"], before["grad"])
    inside = torch.zeros(size, dtype=torch.bool)
    for part in table.ranges():
        inside[part] = True
    assert all(torch.equal(buffers[name][~inside], before[name][~inside]) for name in buffers)
    if copy is not None:
        assert torch.equal(copy, torch.where(inside, buffers["param"], 0.0).to(copy.dtype))


@pytest.mark.parametrize("bad", [None, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_halves_of_a_lamb_step_are_the_whole(kernels: ModuleType, dtype: torch.dtype, bad: float | None) -> None:
    table, size = segments([1, 3, 70_001, 36, 2048])
    whole, halves = optimizer_buffers(size, dtype), optimizer_buffers(size, dtype)
    for buffers in (whole, halves) if bad is not None else ():
        buffers["grad"][table.ranges()[2].start + 40_000] = bad
    options, trust = (table, STEP, ONE * 0.25), Trust(nvlamb=True)
    copies = [torch.zeros(size, dtype=torch.bfloat16) for _ in range(2)]
    flag, ratio = kernels.lamb_step_(*whole.values(), copies[0], *options, trust)
    found, squares = kernels.lamb_moments_(*halves.values(), *options)
    assert torch.equal(reference.trust_ratios(squares, table.scaled(trust), trust), ratio)
    assert int(found) == int(flag) == (bad is not None)
    kernels.lamb_apply_(*halves.values(), copies[1], *options, ratio, found)
    assert all(torch.equal(halves[name], whole[name]) for name in ("param", "exp_avg", "exp_avg_sq"))
    assert torch.equal(*copies)


def test_trust_ratios_follow_the_options(kernels: ModuleType) -> None:
    table, size = segments([300, 300])
    for clamp, nvlamb in ((0.01, True), (0.01, False), (None, False)):
        buffers = optimizer_buffers(size, torch.float32)
        truth = adam_truth(buffers, table, 1.0, lamb=True, clamp=clamp or float("inf"), nvlamb=nvlamb)
        options = (STEP, ONE, Trust(clamp, nvlamb))
        _, ratio = kernels.lamb_step_(*buffers.values(), None, table, *options)
        assert error(ratio, truth["ratio"]) < 1e-6
        assert error(buffers["param"], truth["param"]) < 1e-6
    zero = {name: torch.zeros(size) for name in buffers}
    _, ratio = kernels.lamb_step_(*zero.values(), None, table, *options)
    assert ratio.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("lamb", [False, True], ids=["adamw", "lamb"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_elements_with_gradients_that_are_not_finite_stay(kernels: ModuleType, lamb: bool, bad: float) -> None:
    table, size = segments([5000], gap=0)
    buffers = optimizer_buffers(size, torch.float32)
    buffers["grad"][[3, 4999]] = bad
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    if lamb:
        flag = kernels.lamb_step_(*buffers.values(), None, table, STEP, ONE, Trust(nvlamb=True))[0]
    else:
        flag = kernels.adamw_step_(*buffers.values(), None, table, STEP, ONE)
    assert int(flag) == 1
    for name in ("param", "exp_avg", "exp_avg_sq"):
        changed = buffers[name] != before[name]
        assert changed.nonzero().squeeze(1).tolist() == [i for i in range(size) if i not in (3, 4999)]
        assert buffers[name].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_covers_segments_only(kernels: ModuleType, dtype: torch.dtype) -> None:
    table, size = segments([1, 3, 40_000])
    grad = torch.full((size,), float("nan"), dtype=dtype)
    for part in table.ranges():
        grad[part] = optimizer_buffers(size, dtype)["grad"][part]
    truth = torch.cat([grad[part].double() for part in table.ranges()]).norm()
    assert float(kernels.global_norm(grad, table)) == pytest.approx(float(truth), rel=1e-6)
    grad[table.ranges()[1]] = float("inf")
    assert float(kernels.global_norm(grad, table)) == float("inf")


def test_a_step_has_the_same_bits_on_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.available():
        pytest.skip("no C++ compiler")
    table, size = segments([1, 3, 70_001, 2048])
    results = []
    for machine in MACHINES:
        lib = cpu_library.load(cpu_library.build(machine, cache_folder()))
        monkeypatch.setattr(cpu_library, "library", lambda lib=lib: lib)
        buffers = optimizer_buffers(size, torch.bfloat16)
        cpu.adamw_step_(*buffers.values(), None, table, STEP, ONE * 0.3)
        cpu.lamb_step_(*buffers.values(), None, table, STEP, ONE * 0.3, Trust())
        results.append(buffers)
    assert all(torch.equal(results[0][name], other[name]) for other in results for name in other)


def test_results_do_not_depend_on_the_threads() -> None:
    if not cpu.available():
        pytest.skip("no C++ compiler")
    table, size = segments([1, 100_000, 333, 700_000])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            buffers = optimizer_buffers(size, torch.float32)
            ratio = cpu.lamb_step_(*buffers.values(), None, table, STEP, ONE, Trust(nvlamb=True))[1]
            results.append(torch.cat([buffers["param"], ratio, cpu.global_norm(buffers["grad"], table)[None]]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.slow
def test_a_segment_of_40_million_elements_is_exact(kernels: ModuleType) -> None:
    table, size = segments([40_000_000, 3])
    buffers = optimizer_buffers(size, torch.bfloat16)
    truth = adam_truth(buffers, table, 1.0, lamb=True)
    _, ratio = kernels.lamb_step_(*buffers.values(), None, table, STEP, ONE, Trust(nvlamb=True))
    assert error(ratio, truth["ratio"]) < 1e-5
    assert error(buffers["param"], truth["param"]) < 1e-5


@pytest.mark.slow
def test_many_processes_build_once(tmp_path: Path) -> None:
    if not cpu.available():
        pytest.skip("no C++ compiler")
    code = "import pathlib, sys; from engine.kernels.cpu.library import build; "
    code += f"build({UNOPTIMISED}, pathlib.Path(sys.argv[1]))"
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    names = sorted(path.suffix for path in tmp_path.iterdir())
    assert names == [".lock", ".so"]


def test_the_lock_of_a_killed_builder_is_free(tmp_path: Path) -> None:
    if not cpu.available():
        pytest.skip("no C++ compiler")
    lock = tmp_path / f"cpu_{cpu_library.fingerprint(UNOPTIMISED)}.lock"
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with lock.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.kill()
    holder.wait()
    assert cpu_library.build(UNOPTIMISED, tmp_path).is_file()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_no_working_compiler_gives_one_line_and_plain_torch(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert cpu_library.library.__wrapped__() is None
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert "plain torch runs instead" in caplog.text
