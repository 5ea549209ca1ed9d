"""Builds the emulated kernels and launches them on CPU tensors, in the place of `engine.kernels.cuda.nvrtc.launch`."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from engine.kernels.cache import cache_folder
from engine.kernels.cuda.kernels import CudaKernels
from engine.kernels.cuda.nvrtc import SOURCES

if TYPE_CHECKING:
    from engine.kernels.cuda.arguments import Argument

HERE = Path(__file__).resolve().parent
#: -g1 keeps the lines that sanitizers name, in half the time of -g
FLAGS = ("-std=c++17", "-g1", "-fPIC", "-DCUDA_EMULATOR", "-Wall", "-Wno-unknown-pragmas")
#: how a block's threads take turns: by number, backwards, shuffled at every barrier
SCHEDULES = {"forward": 0, "reverse": 1, "random": 2}


class EmulatorError(RuntimeError):
    """What the emulator found wrong in a kernel, such as a divergent barrier."""


def compiler() -> str:
    """g++, or a visible skip."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("g++ is not installed: the CUDA kernels' sources can't run in the emulator")
    return found


def compile_sources(output: Path, source: Path, flags: Sequence[str], kernels: Path) -> None:
    """Build a C++ file that includes the kernels of the folder `kernels`."""
    command = [compiler(), *FLAGS, *flags, f"-I{HERE}", f"-I{kernels}", str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def built(kernels: Path, folder: Path) -> Path:
    """The shared library of the kernels under `folder`, compiled unless it is there: workers that share it wait."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), HERE / "emulated.py", *kernels.glob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    path = folder / f"emulated_{digest.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                whole = Path(scratch) / path.name
                compile_sources(whole, HERE / "kernels.cpp", ["-O2", "-shared"], kernels)
                whole.replace(path)
    return path


@functools.cache
def build(kernels: Path) -> ctypes.CDLL:
    """The library of emulated kernels, opened once a process and built once for each state of the sources."""
    library = ctypes.CDLL(str(built(kernels, cache_folder())))
    library.has_kernel.argtypes, library.has_kernel.restype = [ctypes.c_char_p], ctypes.c_bool
    library.emulate.restype = ctypes.c_char_p
    library.emulate.argtypes = [
        ctypes.c_char_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_ulonglong,
    ]
    return library


@dataclass(frozen=True)
class Emulator:
    """A launcher for `CudaKernels`."""

    library: ctypes.CDLL
    schedule: str = "random"
    seed: int = 1

    def __call__(
        self, kernel: str, blocks: int, threads: int, arguments: Sequence[Argument], device: torch.device
    ) -> None:
        """Run every block; raises `EmulatorError`."""
        assert device.type == "cpu"
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        order = SCHEDULES[self.schedule]
        error = self.library.emulate(kernel.encode(), blocks, threads, pointers, order, self.seed).decode()
        if error:
            raise EmulatorError(error)


def emulated_kernels(schedule: str = "random", kernels: Path = SOURCES) -> CudaKernels:
    """The host code of the CUDA kernels over the emulator."""
    return CudaKernels(Emulator(build(kernels), schedule))
