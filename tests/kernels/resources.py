"""What the compiled kernels need of a GPU: `python -m tests.kernels.resources 90` prints a table.

From the log of ptxas (NVRTC carries it) and, where nvdisasm is installed, from the machine code.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engine.kernels.cuda.kernels import all_kernels
from engine.kernels.cuda.nvrtc import Compiled, compile_kernels


@dataclass(frozen=True)
class Resources:
    """A kernel's needs."""

    kernel: str
    registers: int
    """32-bit registers a thread"""
    shared: int
    """bytes of static shared memory a block"""
    stack: int
    """bytes of local memory a thread"""
    spills: int
    """bytes of registers stored to and loaded from local memory"""


def resources(compiled: Compiled) -> list[Resources]:
    """One entry a kernel, from ptxas's log."""
    sections = re.split(r"Compiling entry function '(\w+)'", compiled.log)
    by_symbol = dict(zip(sections[1::2], sections[2::2], strict=True))
    return [parse(kernel, by_symbol[symbol]) for kernel, symbol in compiled.symbols.items()]


def parse(kernel: str, log: str) -> Resources:
    """What the log says of one kernel; it must say everything but the shared memory."""
    local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    shared = re.search(r"(\d+) bytes smem", log)
    assert local
    assert registers
    spills = int(local[2]) + int(local[3])
    return Resources(kernel, int(registers[1]), int(shared[1]) if shared else 0, int(local[1]), spills)


def disassembler() -> str | None:
    """nvdisasm, from a wheel or the CUDA toolkit."""
    from cuda.pathfinder import find_nvidia_binary_utility

    return find_nvidia_binary_utility("nvdisasm")


def machine_code(compiled: Compiled, nvdisasm: str) -> dict[str, str]:
    """The disassembly of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        cubin.write_bytes(compiled.code)
        listing = subprocess.run([nvdisasm, str(cubin)], check=True, capture_output=True, text=True).stdout
    sections = re.split(r"\.section\s+\.text\.(\w+)", listing)
    by_symbol = dict(zip(sections[1::2], sections[2::2], strict=True))
    return {kernel: by_symbol[symbol] for kernel, symbol in compiled.symbols.items()}


def accesses(code: str, what: str) -> int:
    """How many 16-byte loads ("LD") or stores ("ST") of global memory are in the code."""
    return len(re.findall(rf"\b{what}G\.E\.128\b", code))


def table(compiled: Compiled, arch: int) -> str:
    """A line a kernel: registers, shared memory, stack, spills, 16-byte loads and stores."""
    nvdisasm = disassembler()
    code = machine_code(compiled, nvdisasm) if nvdisasm else {}
    lines = [f"{f'sm_{arch}':34} registers  shared  stack  spills  128-bit loads, stores"]
    for row in resources(compiled):
        wide = [str(accesses(code[row.kernel], what)) if nvdisasm else "?" for what in ("LD", "ST")]
        numbers = f"{row.registers:9}  {row.shared:6}  {row.stack:5}  {row.spills:6}"
        lines.append(f"{row.kernel:34} {numbers}  {', '.join(wide):>22}")
    return "\n".join(lines)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(table(compile_kernels(all_kernels(), int(argument)), int(argument)))
