"""`zerobert build-kernels`: compile the CUDA kernels ahead of time, for GPU nodes without a compiler or a network."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import UserError
from launch.cli import CommandParser

DESCRIPTION = """Compile every CUDA kernel for some GPUs; this needs no GPU. Runs take the kernels from the folder that
the environment variable ZEROBERT_CUBINS names, and compile what it lacks. Kernels for 8.0 serve 8.6 and 8.9 too.

  zerobert build-kernels --arch 80 90 --output kernels
"""


def capability(text: str) -> int:
    """A GPU's compute capability as NVRTC numbers it.

    Args:
        text: 90, 9.0 or sm_90.

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text)
    if match is None:
        raise UserError(f"arch: {text!r} is no compute capability; give one such as 80 or 9.0")
    return int(match[1]) * 10 + int(match[2])


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert build-kernels", description=DESCRIPTION)
    parser.add_argument("--arch", nargs="+", required=True, metavar="CC", help="compute capabilities, such as 80 90")
    parser.add_argument("--output", type=str, required=True, help="folder to fill")
    return parser


def main(arguments: list[str]) -> int:
    """Fill the folder; kernels that are there already are kept."""
    values = build_parser().parse_args(arguments)
    architectures = sorted({capability(str(text)) for text in values.arch})
    from engine.kernels.cuda.kernels import all_kernels
    from engine.kernels.cuda.nvrtc import cubin_of, supported_architectures

    supported = supported_architectures()
    for arch in architectures:
        if arch not in supported:
            raise UserError(f"arch: {arch} is unknown to this NVRTC; it knows {', '.join(map(str, supported))}")
    for arch in architectures:
        for kernel in all_kernels():
            cubin_of(kernel, arch, Path(values.output))
        print(f"sm_{arch}: {len(all_kernels())} kernels in {values.output}")
    return 0
