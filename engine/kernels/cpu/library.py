"""Builds and loads the C++ kernels for CPUs: once a machine type, with g++ alone, and without torch's headers.

The library talks in plain pointers (ctypes), so one build serves every version of torch and of Python. OpenMP's
runtime is the one that torch has already loaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from engine.kernels.cache import cache_folder

SOURCES = Path(__file__).parent.parent / "csrc"
#: errno and floating-point exceptions block vectorisation; anything of -ffast-math's beyond that would change results
#: (flush to zero for the whole process, reordered sums, no NaN)
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
#: instruction sets by what torch found this CPU capable of, best first; other CPUs get the compiler's default
MACHINES = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}

logger = logging.getLogger(__name__)


def machine_flags(capability: str) -> tuple[str, ...]:
    """Compiler options of a CPU with torch's `torch.backends.cpu.get_cpu_capability()`."""
    return next((flags for name, flags in MACHINES.items() if capability.startswith(name)), ())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels of this CPU; None, after one line of warning, where they can't be built."""
    try:
        return load(build(machine_flags(torch.backends.cpu.get_cpu_capability()), cache_folder()))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "CPU kernels: not built (%s); plain torch runs instead: the same up to rounding, but with dropout, whose "
            "masks are then drawn differently",
            reason(error),
        )
        return None


def available() -> bool:
    """Whether the library is there, built now if need be."""
    return library() is not None


def loaded() -> ctypes.CDLL:
    """The library, where it is available."""
    lib = library()
    assert lib is not None
    return lib


def reason(error: Exception) -> str:
    """The line of a failed build that says why."""
    messages = str(getattr(error, "stderr", None) or error).splitlines()
    return next((line for line in messages if "error" in line), str(error))


def build(machine: tuple[str, ...], folder: Path) -> Path:
    """The shared library for `machine` under `folder`, compiled unless it is there.

    The lock is the kernel's own (flock), so it ends with a builder that is killed; the library appears by a rename.

    Raises:
        OSError: no compiler, or the folder can't be written.
        subprocess.CalledProcessError: the compiler failed; its messages are in `stderr`.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    target = folder / f"cpu_{fingerprint(machine)}.so"
    if target.exists():
        return target
    if compiler is None:
        raise FileNotFoundError("no g++ on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{target.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(compiler, machine, target)
    return target


def fingerprint(machine: tuple[str, ...]) -> str:
    """Identifies sources and options."""
    digest = hashlib.sha256(" ".join((*FLAGS, *machine)).encode())
    for path in sorted([*SOURCES.glob("cpu/*"), *SOURCES.glob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, machine: tuple[str, ...], target: Path) -> None:
    sources = [str(path) for path in sorted(SOURCES.glob("cpu/*.cpp"))]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        command = [compiler, *FLAGS, *machine, *sources, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.replace(target)


def load(path: Path) -> ctypes.CDLL:
    """Open a built library and declare its functions."""
    lib = ctypes.CDLL(str(path))
    pointer, number, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float
    for name in ("fp32", "bf16", "fp16"):
        function = getattr(lib, f"softmax_cross_entropy_{name}")
        flags = [long, real, ctypes.c_bool]
        results = [pointer, pointer, pointer]
        function.argtypes = [pointer, long, pointer, pointer, pointer, long, number, *flags, *results, number]
        function.restype = None
    step: list[type[ctypes._SimpleCData[Any]]] = [pointer, pointer, number]
    lib.adamw_step.argtypes, lib.adamw_step.restype = [*step, number, number], number
    lib.lamb_step.argtypes, lib.lamb_step.restype = [*step, number, pointer, number], number
    lib.lamb_moments.argtypes, lib.lamb_moments.restype = [*step, pointer, number], number
    lib.lamb_apply.argtypes, lib.lamb_apply.restype = [*step, number, pointer, number, number], None
    lib.global_norm.argtypes = [pointer, number, number]
    lib.global_norm.restype = real
    for name in ("fp32", "bf16"):
        forward, backward = getattr(lib, f"layer_norm_{name}"), getattr(lib, f"layer_norm_backward_{name}")
        forward.argtypes, forward.restype = [pointer, number], None
        backward.argtypes, backward.restype = [*[pointer] * 7, number], None
        forward, backward = (getattr(lib, f"packed_attention{way}_{name}") for way in ("", "_backward"))
        forward.argtypes, forward.restype = [pointer, number], None
        backward.argtypes, backward.restype = [*[pointer] * 3, number], None
    rows = {"gelu_bf16": 3, "gelu_backward_bf16": 5, "column_sum_bf16": 2, "add_rows_bf16": 4}
    rows |= {f"geglu_{kind}": 2 for kind in ("fp32", "bf16")} | {
        f"geglu_backward_{kind}": 3 for kind in ("fp32", "bf16")
    }
    for name, buffers in rows.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = [*[pointer] * buffers, long, number, number], None
    lib.attention_usable.restype = ctypes.c_bool
    if lib.attention_usable():
        lib.attention_forward.argtypes, lib.attention_forward.restype = [pointer, number], None
        lib.attention_backward.argtypes, lib.attention_backward.restype = [pointer, pointer, number], None
    return lib
