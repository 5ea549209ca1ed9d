"""From CUDA sources to a launched kernel: NVRTC through NVIDIA's cuda-core, with compiled kernels kept on disk.

Nothing of CUDA is imported before the first compilation or launch, and compiling needs no GPU. A kernel is named by its
C++ expression, such as `adamw<bf16, bf16, 256>`. Its file holds one line with the mangled name, then the cubin.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.errors import UserError
from engine.kernels.cache import cache_folder

if TYPE_CHECKING:
    from cuda.core import Kernel

    from engine.kernels.cuda.arguments import Argument

SOURCES = Path(__file__).parent.parent / "csrc"
INCLUDED = ("activation", "column_sum", "layer_norm", "norm", "optimizer", "xent")
PROGRAM = "".join(f'#include "{name}.cuh"\n' for name in INCLUDED)
#: fp32 stays strict: no flushing of denormals, IEEE division and square root
STANDARD = "c++17"
#: environment variable that names a folder filled by `zerobert build-kernels`
PREBUILT = "ZEROBERT_CUBINS"


def extra(cuda: str | None) -> str:
    """The extra that fits torch's version of CUDA, such as 12.8; None in a build for CPUs."""
    return f"cuda{cuda.partition('.')[0]}" if cuda else "cuda"


MISSING = (
    f"cuda-core is not installed; pip install 'zerobert[{extra(torch.version.cuda)}]', "
    f"or name prebuilt kernels in {PREBUILT}"
)


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel."""

    symbol: str
    """mangled name"""
    code: bytes

    def to_bytes(self) -> bytes:
        """The content of a cache file."""
        return self.symbol.encode() + b"\n" + self.code

    @classmethod
    def from_bytes(cls, content: bytes) -> Cubin:
        """The inverse of `to_bytes`."""
        symbol, _, code = content.partition(b"\n")
        return cls(symbol.decode(), code)


@functools.cache
def sources_digest() -> str:
    """Identifies the CUDA sources and the options they are compiled with."""
    digest = hashlib.sha256((PROGRAM + STANDARD).encode())
    for path in sorted(SOURCES.glob("*.cuh")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def file_name(kernel: str, arch: int) -> str:
    """The cache file of a kernel for compute capability `arch`, e.g. 90 for 9.0."""
    digest = hashlib.sha256(f"{kernel} {sources_digest()}".encode()).hexdigest()
    return f"{kernel.split('<')[0]}-sm{arch}-{digest[:16]}.cubin"


def supported_architectures() -> list[int]:
    """The compute capabilities that the installed NVRTC compiles for.

    Raises:
        UserError: cuda-core is not installed.
    """
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import nvrtc
    except ImportError:
        raise UserError(f"CUDA kernels: {MISSING}") from None
    _, architectures = nvrtc.nvrtcGetSupportedArchs()
    return list(architectures)


@functools.cache
def version() -> str:
    """NVRTC's version, such as 13.0; "none" where it can't be loaded."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError):
        return "none"
    return f"{major}.{minor}"


def cubin_folder() -> Path:
    """Where kernels compiled at their first use stay: by NVRTC's version, as nodes may share a home."""
    return cache_folder() / "cuda" / f"nvrtc-{version()}"


@dataclass(frozen=True)
class Compiled:
    """Several kernels in one cubin."""

    symbols: dict[str, str]
    """mangled name of each kernel"""
    code: bytes
    log: str
    """what ptxas tells: registers, shared memory, spills"""


def compile_kernels(kernels: Sequence[str], arch: int) -> Compiled:
    """Compile kernels for compute capability `arch`, e.g. 90 for 9.0.

    Raises:
        UserError: cuda-core or the CUDA headers are not installed.
        cuda.core's NVRTCError: the source or the architecture is refused.
    """
    try:
        from cuda.core import Program, ProgramOptions
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError:
        raise UserError(f"CUDA kernels: {MISSING}") from None
    headers = find_nvidia_header_directory("cudart")
    if headers is None:
        raise UserError("CUDA kernels: the CUDA headers are missing; pip install nvidia-cuda-runtime")
    options = ProgramOptions(
        arch=f"sm_{arch}",
        std=STANDARD,
        include_path=[str(SOURCES), str(headers)],
        ptxas_options=["-v"],
        device_as_default_execution_space=True,  # before 13.2, NVRTC takes a lambda in a kernel for a host function
    )
    log = io.StringIO()
    compiled = Program(PROGRAM, "c++", options).compile("cubin", name_expressions=tuple(kernels), logs=log)
    symbols = {kernel: bytes(symbol).decode() for kernel, symbol in compiled.symbol_mapping.items()}
    return Compiled(symbols, bytes(compiled.code), log.getvalue())


def store(cubin: Cubin, path: Path) -> None:
    """Write a cache file; readers and other writers meet the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
        scratch.write(cubin.to_bytes())
    Path(scratch.name).chmod(0o644)
    Path(scratch.name).replace(path)


def cubin_of(kernel: str, arch: int, folder: Path) -> Cubin:
    """The kernel from `folder`, or else compiled and put there.

    Ranks that start together may compile the same kernel (a fifth of a second) and replace each other's equal files.
    """
    path = folder / file_name(kernel, arch)
    if path.exists():
        return Cubin.from_bytes(path.read_bytes())
    compiled = compile_kernels([kernel], arch)
    cubin = Cubin(compiled.symbols[kernel], compiled.code)
    store(cubin, path)
    return cubin


def find_cubin(kernel: str, capability: tuple[int, int]) -> Cubin:
    """The kernel for a GPU: prebuilt for it or an older GPU of its generation, cached, or compiled now."""
    major, minor = capability
    prebuilt = os.environ.get(PREBUILT)
    for older in range(minor, -1, -1) if prebuilt else ():
        path = Path(str(prebuilt)) / file_name(kernel, major * 10 + older)
        if path.exists():
            return Cubin.from_bytes(path.read_bytes())
    return cubin_of(kernel, major * 10 + minor, cubin_folder())


@functools.cache
def load(kernel: str, capability: tuple[int, int]) -> Kernel:
    """The kernel, ready for every GPU of that compute capability in this process."""
    cubin = find_cubin(kernel, capability)
    try:
        from cuda.core import ObjectCode
    except ImportError:
        raise UserError(f"CUDA kernels: {MISSING}") from None
    return ObjectCode.from_cubin(cubin.code).get_kernel(cubin.symbol)


class _CurrentStream:
    """torch's current stream in the form that cuda-core takes from other libraries."""

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def launch(kernel: str, blocks: int, threads: int, arguments: Sequence[Argument], device: torch.device) -> None:
    """Queue a kernel on torch's current stream; the arguments have the C types of its parameters."""
    with torch.cuda.device(device):
        loaded = load(kernel, torch.cuda.get_device_capability(device))
        from cuda.core import LaunchConfig
        from cuda.core import launch as enqueue

        enqueue(_CurrentStream(device), LaunchConfig(grid=blocks, block=threads), loaded, *arguments)
