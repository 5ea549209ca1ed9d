"""The CUDA kernels under several versions of NVRTC: `python -m tests.kernels.compilers` prints a table.

The installed one comes last. The others' wheels are kept under the user's cache. A version is opened by its path, in a
process of its own, before cuda-core looks for one; the headers stay the installed ones. Some ten minutes of a core.
"""

from __future__ import annotations

import ctypes
import functools
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from engine.kernels.cache import cache_folder

ROOT = Path(__file__).resolve().parents[2]
#: by version, the package that holds it; the oldest first
WHEELS = {"12.6": "nvidia-cuda-nvrtc-cu12", "12.8": "nvidia-cuda-nvrtc-cu12", "13.0": "nvidia-cuda-nvrtc"}
INSTALLED = "installed"


@functools.cache
def compiler(version: str) -> Path:
    """The library of an NVRTC such as 12.6, downloaded unless it is there.

    Raises:
        OSError: it can't be had here.
    """
    folder = cache_folder().parent / "nvrtc" / version
    if not any(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        try:
            subprocess.run(
                [*command, f"{WHEELS[version]}=={version}.*"], check=True, capture_output=True, text=True, timeout=120
            )
        except subprocess.SubprocessError as error:
            last = (str(getattr(error, "stderr", None) or error).splitlines() or [""])[-1]
            raise OSError(f"{WHEELS[version]}=={version}.* can't be downloaded: {last}") from None
    if not any(folder.glob("nvidia/*/lib/libnvrtc.so.*")):
        for wheel in folder.glob("*nvrtc*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
    return next(folder.glob("nvidia/*/lib/libnvrtc.so.1?"))


def spills(version: str, architectures: Sequence[int] = ()) -> dict[int, dict[str, int]]:
    """Spilled bytes of each kernel by architecture, those that the version knows (from 7.5 on) by default.

    Args:
        version: one of `WHEELS`, or `INSTALLED`.

    Raises:
        OSError: the version can't be had here.
        subprocess.CalledProcessError: a kernel doesn't compile; `stderr` says why.
    """
    library = INSTALLED if version == INSTALLED else str(compiler(version))
    command = [sys.executable, "-m", "tests.kernels.compilers", library, *map(str, architectures)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return {int(arch): kernels for arch, kernels in json.loads(done.stdout).items()}


def compile_here(library: str, architectures: Sequence[int]) -> dict[int, dict[str, int]]:
    """What `spills` returns, by the library at a path or the installed one."""
    if library != INSTALLED:
        for path in (*Path(library).parent.glob("libnvrtc-builtins.so.*"), library):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    from cuda.bindings import nvrtc as bindings

    from engine.kernels.cuda.kernels import all_kernels
    from engine.kernels.cuda.nvrtc import compile_kernels, supported_architectures
    from tests.kernels.resources import resources

    _, *version = bindings.nvrtcVersion()
    loaded = ".".join(map(str, version))
    assert library == INSTALLED or Path(library).parents[3].name == loaded, f"{loaded} was loaded, not {library}"
    chosen = architectures or [arch for arch in supported_architectures() if arch >= 75]
    return {
        arch: {row.kernel: row.spills for row in resources(compile_kernels(all_kernels(), arch))} for arch in chosen
    }


def line(version: str, arch: int, kernels: dict[str, int]) -> str:
    """A line of the table."""
    spilled = ", ".join(f"{kernel}: {count} bytes" for kernel, count in kernels.items() if count)
    return f"NVRTC {version:9} sm_{arch:<4} {len(kernels)} kernels compile; spills: {spilled or 'none'}"


def table() -> int:
    """Print a line a version and architecture and a last one of the whole; returns how many kernels spill."""
    compiled = spilling = architectures = 0
    for each in (*WHEELS, INSTALLED):
        try:
            found = spills(each)
        except OSError as missing:
            print(f"NVRTC {each:9} skipped: {missing}", flush=True)
            continue
        print("\n".join(line(each, arch, kernels) for arch, kernels in found.items()), flush=True)
        architectures += len(found)
        compiled += sum(len(kernels) for kernels in found.values())
        spilling += sum(1 for kernels in found.values() for count in kernels.values() if count)
    print(f"{compiled} compilations, {architectures} pairs of compiler and architecture; {spilling} have spills")
    return spilling


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(compile_here(sys.argv[1], [int(arch) for arch in sys.argv[2:]])))
    else:
        sys.exit(1 if table() else 0)
