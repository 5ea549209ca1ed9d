"""The measured peak: of the right products, in bounds, and leaving no trace in the run."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from engine.kernels.gemm import CPU_SHAPES, FORMS, GemmPeak, flops_of, measure_peak
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def peak() -> GemmPeak:
    return measure_peak(torch.float32, CPU, seconds=0.01)


def test_no_product_of_another_size_is_much_faster(peak: GemmPeak) -> None:
    rows, weight = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(rows, weight)
        best = min(best, time.perf_counter() - start)
    # 1.6: other processes may have had the machine while one of the two was measured
    assert 0 < flops_of((1024, 1024, 1024)) / best < 1.6 * peak.flops


def test_it_says_what_was_measured(peak: GemmPeak) -> None:
    assert peak.shape in CPU_SHAPES
    assert peak.form in FORMS
    assert peak.tried == len(CPU_SHAPES) * len(FORMS)
    size = "x".join(map(str, peak.shape))
    threads = torch.get_num_threads()
    assert str(peak) == f"fp32 {peak.form} {size}, the fastest of {peak.tried} products, on {threads} thread(s)"


def test_flops_are_multiplications_and_additions() -> None:
    assert flops_of((2, 3, 5)) == 60


def test_dropout_stays_what_it_would_have_been() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measure_peak(torch.float32, CPU, seconds=0.01)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_another_type_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"dtype: {dtype} is none of fp32, bf16, fp16"):
        measure_peak(dtype, CPU)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"seconds: .* is not a positive number"):
        measure_peak(torch.float32, CPU, seconds)


@pytest.mark.slow
def test_it_needs_no_deepspeed() -> None:
    code = "import sys, engine.kernels.gemm; print({'deepspeed', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
