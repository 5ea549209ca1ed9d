"""torch's build, the driver, the accelerators, and the back ends of torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.train.ranks.gpus import SELECTOR, runs_on
from launch.doctor.finding import Finding, find_tool, first_line, size


@dataclass(frozen=True)
class VisibleGpu:
    """A device as torch sees it; memory in bytes."""

    name: str
    memory: int
    capability: tuple[int, int]


def driver_version() -> str | None:
    """NVIDIA's driver as nvidia-smi tells it; None without nvidia-smi or a GPU."""
    tool = find_tool("nvidia-smi")
    if tool is None:
        return None
    try:
        return first_line([tool, "--query-gpu=driver_version", "--format=csv,noheader"]) or None
    except RuntimeError:
        return None


def visible_gpus() -> list[VisibleGpu]:
    """The GPUs that torch can use."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(VisibleGpu(properties.name, properties.total_memory, (properties.major, properties.minor)))
    return gpus


def gpu_count() -> int:
    """How many GPUs torch can use; 0 if it can't even be imported, which `check_torch` tells."""
    try:
        return len(visible_gpus())
    except Exception:  # a broken torch raises anything
        return 0


def check_torch() -> Iterator[Finding]:
    """torch's build against the driver, and each GPU against the build."""
    import torch

    build = torch.version.cuda or torch.version.hip
    gpus = visible_gpus()
    yield judge_build(torch.__version__, build, driver_version(), len(gpus))
    yield from judge_gpus(gpus, torch.cuda.get_arch_list() if gpus and torch.version.cuda else [])


def judge_build(version: str, build: str | None, driver: str | None, gpus: int) -> Finding:
    """Whether this torch can use what the machine has.

    Args:
        build: CUDA or HIP version that torch was built for; None for a CPU build.
        driver: version of NVIDIA's driver; None if there is none.
        gpus: how many torch sees.
    """
    found = f"{version}, {f'for CUDA or HIP {build}' if build else 'for CPUs'}"
    if driver is None:
        return Finding("torch", "ok", found + ("" if build is None or gpus else ", no driver"))
    found += f"; NVIDIA driver {driver}"
    if build is None:
        return Finding("torch", "problem", found, f"this torch ignores the GPUs; install a CUDA build ({SELECTOR})")
    if not gpus:
        remedy = f"install a torch for an older CUDA ({SELECTOR}) or a newer driver; look at CUDA_VISIBLE_DEVICES too"
        return Finding("torch", "problem", found + "; torch sees no GPU", remedy)
    return Finding("torch", "ok", found)


def judge_gpus(gpus: Sequence[VisibleGpu], architectures: Sequence[str]) -> Iterator[Finding]:
    """A line a kind of GPU.

    Args:
        architectures: that torch was compiled for, such as sm_90; empty if that isn't known.
    """
    if not gpus:
        yield Finding("accelerators", "note", "no GPU: ranks train on CPUs")
    for gpu in sorted(set(gpus), key=gpus.index):
        major, minor = gpu.capability
        found = f"{gpus.count(gpu)} x {gpu.name}, {size(gpu.memory)}, compute capability {major}.{minor}"
        if architectures and not any(runs_on(name, major, minor) for name in architectures):
            remedy = f"this torch has no code for sm_{major}{minor}; install one that has ({SELECTOR})"
            yield Finding("accelerators", "problem", found, remedy)
        else:
            yield Finding("accelerators", "ok", found)


def check_backends() -> Iterator[Finding]:
    """NCCL and gloo in this torch."""
    import torch
    import torch.distributed as torch_dist

    nccl = (
        ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda and torch_dist.is_nccl_available() else None
    )
    yield judge_backends(nccl, torch_dist.is_gloo_available(), len(visible_gpus()))


def judge_backends(nccl: str | None, gloo: bool, gpus: int) -> Finding:
    """Whether ranks can talk to one another: by NCCL on GPUs, by gloo on CPUs."""
    found = f"NCCL {nccl or 'not in this torch'}, gloo {'in this torch' if gloo else 'not in this torch'}"
    missing = nccl is None if gpus else not gloo
    remedy = f"install a torch with {'NCCL' if gpus else 'gloo'} ({SELECTOR})" if missing else ""
    return Finding("back ends", "problem" if missing else "ok", found, remedy)
