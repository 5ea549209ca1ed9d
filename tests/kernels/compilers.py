"""The CUDA kernels under other versions of NVRTC: `python -m tests.kernels.compilers` prints a table.

The wheels are kept under the user's cache. A version is opened by its path, in a process of its own, before cuda-core
looks for one; the headers stay the installed ones.
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

    Raises:
        OSError: the version can't be had here.
        subprocess.CalledProcessError: a kernel doesn't compile; `stderr` says why.
    """
    command = [sys.executable, "-m", "tests.kernels.compilers", str(compiler(version)), *map(str, architectures)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return {int(arch): kernels for arch, kernels in json.loads(done.stdout).items()}


def compile_here(library: Path, architectures: Sequence[int]) -> dict[int, dict[str, int]]:
    """What `spills` returns, by the library at a path."""
    for path in (*library.parent.glob("libnvrtc-builtins.so.*"), library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    from cuda.bindings import nvrtc as bindings

    from engine.kernels.cuda.kernels import all_kernels
    from engine.kernels.cuda.nvrtc import compile_kernels, supported_architectures
    from tests.kernels.resources import resources

    _, *version = bindings.nvrtcVersion()
    assert library.parents[3].name == ".".join(map(str, version)), f"{version} was loaded, not {library}"
    chosen = architectures or [arch for arch in supported_architectures() if arch >= 75]
    return {
        arch: {row.kernel: row.spills for row in resources(compile_kernels(all_kernels(), arch))} for arch in chosen
    }


def line(version: str, arch: int, kernels: dict[str, int]) -> str:
    """A line of the table."""
    spilled = ", ".join(f"{kernel}: {count} bytes" for kernel, count in kernels.items() if count)
    return f"NVRTC {version:5} sm_{arch:<4} {len(kernels)} kernels compile; spills: {spilled or 'none'}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(compile_here(Path(sys.argv[1]), [int(arch) for arch in sys.argv[2:]])))
    else:
        for each in WHEELS:
            try:
                print("\n".join(line(each, arch, kernels) for arch, kernels in spills(each).items()), flush=True)
            except OSError as missing:
                print(f"NVRTC {each:5} skipped: {missing}", flush=True)
