"""Our kernels: which are built, and whether the rest can be; and the tools that DeepSpeed's own operators need."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.doctor.accelerators import gpu_count, visible_gpus
from launch.doctor.finding import Finding, find_tool, first_line

#: of kernels whose dropout has masks of its own, the CPU's and the GPU's
SLOWER = "plain torch runs instead: the same up to rounding, but with dropout, whose masks are then drawn differently"


def check_cpu_kernels() -> Iterator[Finding]:
    """The C++ library of this machine."""
    import torch

    from engine.kernels.cache import cache_folder
    from engine.kernels.cpu import library as cpu_library

    capability = torch.backends.cpu.get_cpu_capability()
    folder = cache_folder()
    library = folder / f"cpu_{cpu_library.fingerprint(cpu_library.machine_flags(capability))}.so"
    if library.exists():
        yield judge_library(library, capability)
    else:
        yield judge_compiler(os.environ.get("CXX", "g++"), capability, folder)


def judge_library(library: Path, capability: str) -> Finding:
    """Whether a built library opens."""
    from engine.kernels.cpu import library as cpu_library

    try:
        cpu_library.load(library)
    except (OSError, AttributeError) as error:
        return Finding(
            "CPU kernels", "problem", f"{library} can't be opened ({error})", f"rm {library}; it is built anew"
        )
    return Finding("CPU kernels", "ok", f"built for {capability}: {library}")


def judge_compiler(compiler: str, capability: str, folder: Path) -> Finding:
    """Whether the library can be built at the first use."""
    path = find_tool(compiler)
    if path is None:
        remedy = f"install {compiler} (Debian: apt install g++), or train on; {SLOWER}"
        return Finding("CPU kernels", "note", f"not built, and no {compiler} on PATH", remedy)
    above = existing(folder)
    if not os.access(above, os.W_OK):
        remedy = f"name a folder that can be written in XDG_CACHE_HOME, or train on; {SLOWER}"
        return Finding("CPU kernels", "note", f"not built, and {above} can't be written", remedy)
    return Finding("CPU kernels", "ok", f"{first_line([path, '--version'])} builds them for {capability} at first use")


def existing(path: Path) -> Path:
    """The nearest folder above `path` that is there, or itself."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def check_cuda_kernels() -> Iterator[Finding]:
    """The CUDA kernels: prebuilt, cached, or compiled at first use by NVRTC."""
    from engine.kernels.cuda.nvrtc import PREBUILT, cubin_folder

    prebuilt = os.environ.get(PREBUILT)
    if prebuilt and not Path(prebuilt).is_dir():
        remedy = f"unset {PREBUILT}, or fill it: zerobert build-kernels --arch 90 --output {prebuilt}"
        yield Finding("CUDA kernels", "problem", f"{PREBUILT} names {prebuilt}, which is no folder", remedy)
    folders = [Path(prebuilt)] if prebuilt else []
    capabilities = sorted({gpu.capability for gpu in visible_gpus()})
    yield judge_cuda(capabilities, compiler_of_cuda(), [*folders, cubin_folder()])


def compiler_of_cuda() -> str | None:
    """What NVRTC compiles for, in words; None where cuda-core or NVRTC can't be imported."""
    from engine.errors import UserError
    from engine.kernels.cuda.nvrtc import supported_architectures

    if importlib.util.find_spec("cuda") is None:
        return None
    try:
        architectures = supported_architectures()
    except (UserError, RuntimeError, OSError):
        return None
    return f"NVRTC compiles for {architectures[0]} to {architectures[-1]}"


def judge_cuda(capabilities: Sequence[tuple[int, int]], compiler: str | None, folders: Sequence[Path]) -> Finding:
    """Whether each GPU gets its kernels.

    Args:
        capabilities: of the GPUs here.
        compiler: what NVRTC compiles for; None without it.
        folders: where compiled kernels lie.
    """
    from engine.kernels.cuda.nvrtc import MISSING

    cached = cached_architectures(folders)
    listed = ", ".join(f"{count} for sm_{arch}" for arch, count in sorted(cached.items())) or "none"
    found = f"{compiler or 'no NVRTC'}; compiled already: {listed}"
    lacking = [f"{major}.{minor}" for major, minor in capabilities if not serves(cached, major, minor)]
    if compiler is None and lacking:
        return Finding(
            "CUDA kernels", "note", f"{found}; GPUs of {', '.join(lacking)} have none", f"{MISSING}; {SLOWER}"
        )
    return Finding("CUDA kernels", "ok", found + ("" if capabilities else "; no GPU here"))


def cached_architectures(folders: Sequence[Path]) -> Counter[int]:
    """Up-to-date kernel files by the compute capability that they were compiled for, such as 90."""
    from engine.kernels.cuda.kernels import all_kernels
    from engine.kernels.cuda.nvrtc import file_name

    counts: Counter[int] = Counter()
    for folder in folders:
        there = {path.name for path in folder.glob("*.cubin")}
        for arch in {int(match[1]) for name in there if (match := re.search(r"-sm(\d+)-", name))}:
            counts[arch] += sum(file_name(kernel, arch) in there for kernel in all_kernels())
    return counts


def serves(cached: Counter[int], major: int, minor: int) -> bool:
    """Whether every kernel is there for a GPU: compiled for it or for an older one of its generation."""
    from engine.kernels.cuda.kernels import all_kernels

    return any(cached[major * 10 + older] >= len(all_kernels()) for older in range(minor + 1))


def check_operator_tools() -> Iterator[Finding]:
    """What DeepSpeed compiles its own operators with: CPU Adam for offload, and asynchronous files for NVMe."""
    missing = (
        []
        if find_tool("ninja")
        else ["ninja (pip install ninja, and activate its environment): no DeepSpeed operator can be built"]
    )
    if find_tool("g++") is None:
        missing.append("g++ (apt install g++): no DeepSpeed operator can be built")
    if gpu_count() and find_tool("nvcc") is None:
        missing.append("nvcc (the CUDA toolkit): no DeepSpeed operator for GPUs can be built")
    if ctypes.util.find_library("aio") is None:
        missing.append("libaio (apt install libaio-dev): zero.offload_optimizer nvme can't be used")
    if missing:
        names = ", ".join(tool.split(" (")[0] for tool in missing)
        yield Finding(
            "DeepSpeed's tools", "note", f"missing: {names}", "needed for offload only; " + "; ".join(missing)
        )
    else:
        yield Finding(
            "DeepSpeed's tools", "ok", "ninja, g++ and libaio are there" + (", nvcc too" if find_tool("nvcc") else "")
        )
