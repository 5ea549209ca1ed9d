"""The second launch of sums over rows on GPUs; the source is csrc/column_sum.cuh."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.kernels.cuda.arguments import TYPES, WARP, Launcher, flat

#: threads a block
THREADS = 1024

if TYPE_CHECKING:
    from engine.kernels.cuda.arguments import Argument


def sum_kernels() -> list[str]:
    """Every kernel that `sum_partials` may launch."""
    return [f"sum_partials<{name}, {THREADS}>" for name in TYPES.values()]


def sum_partials(launch: Launcher, partial: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, W] fp32, sums of parts of the rows, to their sum [W] in `dtype`; one launch."""
    parts, width = partial.shape
    total = torch.empty(width, dtype=dtype, device=partial.device)
    arguments: list[Argument] = [flat(partial), ctypes.c_int(parts), ctypes.c_int(width), flat(total)]
    launch(f"sum_partials<{TYPES[dtype]}, {THREADS}>", -(-width // WARP), THREADS, arguments, partial.device)
    return total
