"""The fastest matrix product that this rank reaches now, measured: what a model's FLOPs are held against.

A data sheet's peak is one of clocks and units that no rank has to itself. A measured one has the rank's threads, its
neighbours and its library in it, so a share of it says what the training loop loses, not what the machine lacks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.precision import PRECISIONS

#: rows, inner size, columns: a feed-forward layer of BERT-base over 1024 and 4096 tokens, and a square
CPU_SHAPES = ((1024, 768, 3072), (4096, 768, 3072), (2048, 2048, 2048))
#: large enough to fill a GPU: a feed-forward layer of BERT-large over 16384 tokens, and squares
GPU_SHAPES = ((16384, 1024, 4096), (4096, 4096, 4096), (8192, 8192, 8192))
#: the products of a linear layer's forward (weight transposed) and backward pass
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linear": F.linear, "mm": torch.mm}
#: seconds after which no further product is tried: a CPU without bf16 instructions would take minutes for all
LONGEST_TRIAL = 4.0


@dataclass(frozen=True)
class GemmPeak:
    """The fastest of the measured products."""

    flops: float
    """FLOP/s; a multiplication and an addition are two"""
    form: str
    """linear or mm"""
    shape: tuple[int, int, int]
    """rows, inner size, columns"""
    precision: str
    """fp32, bf16 or fp16"""
    device: str
    """name of the GPU, or cpu"""
    threads: int
    """of the rank on a CPU"""
    tried: int
    """products measured"""

    def __str__(self) -> str:
        where = f"{self.threads} thread(s)" if self.device == "cpu" else self.device
        size = "x".join(map(str, self.shape))
        return f"{self.precision} {self.form} {size}, the fastest of {self.tried} products, on {where}"


def measure_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> GemmPeak:
    """Time a few large matrix products, in turn, and take the fastest run of all.

    Draws from a generator of its own, so a run's dropout is what it would have been.

    Args:
        dtype: float32, bfloat16 or float16.
        device: a CPU, with torch's current number of threads, or a GPU, timed by its events.
        seconds: rounds begin as long as these aren't over; at least one, after one that doesn't count.

    Raises:
        ValueError: another dtype, or no positive time.
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype: {dtype} is none of {', '.join(PRECISIONS.values())}")
    if not seconds > 0:
        raise ValueError(f"seconds: {seconds} is not a positive number")
    on_cpu = device.type == "cpu"
    products = _products(CPU_SHAPES if on_cpu else GPU_SHAPES, dtype, device)
    clock = _host_seconds if on_cpu else _device_seconds
    products = _tried_once(products, clock)
    fastest, deadline = [math.inf] * len(products), time.perf_counter() + seconds
    while True:
        fastest = [min(known, clock(product)) for known, product in zip(fastest, products, strict=True)]
        if time.perf_counter() >= deadline:
            break
    rates = [flops_of(product.shape) / taken for product, taken in zip(products, fastest, strict=True)]
    best = products[max(range(len(rates)), key=rates.__getitem__)]
    name = "cpu" if on_cpu else torch.cuda.get_device_name(device)
    return GemmPeak(max(rates), best.form, best.shape, PRECISIONS[dtype], name, torch.get_num_threads(), len(products))


def _tried_once(products: list[_Product], clock: Callable[[_Product], float]) -> list[_Product]:
    """The products after a run each that doesn't count; the first ones alone where the device takes long for them."""
    over, tried = time.perf_counter() + LONGEST_TRIAL, []
    for product in products:
        tried.append(product)
        clock(product)
        if time.perf_counter() > over:
            break
    return tried


def flops_of(shape: tuple[int, int, int]) -> int:
    """FLOPs of a matrix product with so many rows, inner elements and columns."""
    rows, inner, columns = shape
    return 2 * rows * inner * columns


@dataclass(frozen=True)
class _Product:
    form: str
    shape: tuple[int, int, int]
    left: Tensor
    """[rows, inner]"""
    right: Tensor
    """[columns, inner] for a linear layer, [inner, columns] for mm"""

    @torch.no_grad()
    def run(self) -> None:
        FORMS[self.form](self.left, self.right)


def _products(shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> list[_Product]:
    """Each shape in each form; on numbers and not on zeros, for a GPU's clock depends on how many bits flip."""
    generator = torch.Generator(device).manual_seed(0)
    products = []
    for rows, inner, columns in shapes:
        left = torch.randn(rows, inner, dtype=dtype, device=device, generator=generator)
        weight = torch.randn(columns, inner, dtype=dtype, device=device, generator=generator)
        products.append(_Product("linear", (rows, inner, columns), left, weight))
        products.append(_Product("mm", (rows, inner, columns), left, weight.t().contiguous()))
    return products


def _host_seconds(product: _Product) -> float:
    start = time.perf_counter()
    product.run()
    return time.perf_counter() - start


def _device_seconds(product: _Product) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    product.run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000
