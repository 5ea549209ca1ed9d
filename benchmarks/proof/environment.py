"""The card, its driver and the software; measured bandwidth, matrix products and launches."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.common import ROOT
from benchmarks.proof.stage import Report, Setting
from benchmarks.proof.timing import milliseconds
from engine.kernels.gemm import measure_peak
from engine.precision import DTYPES
from launch.forecast.gpus import GPUS, detected_gpu

#: distributions whose versions figures depend on, beside those that pyproject.toml requires
OTHERS = ("triton", "accelerate", "liger-kernel", "cuda-core", "nvidia-cuda-nvrtc", "nvidia-nccl-cu13", "pytest")
#: elements of a copy in fp32
COPIED, COPIED_TOY = 1 << 28, 1 << 22
LAUNCHES = 2000


def requirements() -> Iterator[str]:
    """The distributions that pyproject.toml requires."""
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("\ndependencies = [") : text.index("\n]\n", text.index("\ndependencies = ["))]
    for line in block.splitlines():
        if match := re.match(r'\s+"([A-Za-z0-9_.-]+)', line):
            yield match[1]


def versions() -> dict[str, str]:
    """Of each distribution, or "missing"."""
    found = {"python": platform.python_version()}
    for name in (*requirements(), *OTHERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def driver() -> str:
    """The driver's version, as nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return done.stdout.split("\n")[0].strip() or "unknown"


def card() -> dict[str, Any]:
    """What the GPU says of itself, and which card of the plan it is."""
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    return {
        "name": properties.name,
        "key": detected_gpu(properties.name, properties.total_memory) or "unknown",
        "memory GB": properties.total_memory / 1e9,
        "capability": f"{major}.{minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver(),
        "CUDA of torch": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "GPUs": torch.cuda.device_count(),
        "compute-sanitizer": shutil.which("compute-sanitizer") or "missing",
    }


def bandwidth(device: torch.device, elements: int) -> float:
    """Bytes a second of a copy, those read and those written."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), device, None) for _ in range(10))
    return 8 * elements / best * 1e3


def products(device: torch.device) -> dict[str, float]:
    """FLOP/s of the fastest product in each precision; fp32 on a GPU with TF32 and without."""
    if device.type == "cpu":
        return {"fp32": measure_peak(torch.float32, device, seconds=0.1).flops}
    found = {name: measure_peak(DTYPES[name], device).flops for name in ("bf16", "fp16")}
    for name, precision in (("tf32", "high"), ("fp32", "highest")):
        torch.set_float32_matmul_precision(precision)
        found[name] = measure_peak(torch.float32, device, seconds=0.2).flops
    return found


def launches(device: torch.device) -> dict[str, float]:
    """Microseconds of a small operator that the host sends one after the other, and of one that it waits for."""
    small = torch.zeros(32, device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def each(count: int, waiting: bool) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            small.add_(1)
            if waiting:
                wait()
        wait()
        return (time.perf_counter() - start) / count * 1e6

    each(100, waiting=True)
    return {"sent one after the other": each(LAUNCHES, waiting=False), "waited for": each(LAUNCHES // 10, waiting=True)}


def run(setting: Setting, report: Report) -> None:
    device = torch.device(setting.device)
    software = {"versions": versions()}
    known = card() if device.type == "cuda" else {"name": "CPU", "key": "cpu", "threads": torch.get_num_threads()}
    report.put({"title": "card and software", "rivals": {"card": known} | software})
    sheet = GPUS.get(known["key"])
    copied = bandwidth(device, COPIED_TOY if setting.toy else COPIED)
    share = {"% of the data sheet": 100 * copied / sheet.memory_bandwidth} if sheet else {}
    report.put({"title": "memory", "rivals": {"copy": {"GB/s": copied / 1e9} | share}})
    rates: dict[str, dict[str, Any]] = {}
    for name, flops in products(device).items():
        rates[name] = {"TFLOP/s": flops / 1e12}
        if sheet and name in ("bf16", "fp16"):
            rates[name]["% of the data sheet"] = 100 * flops / sheet.peak_flops
    report.put({"title": "fastest matrix products", "rivals": rates})
    shown = {name: {"us": value} for name, value in launches(device).items()}
    report.put({"title": "a small operator, microseconds", "rivals": shown})
