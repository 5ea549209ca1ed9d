"""Bias and GELU, GeGLU and sums over rows on GPUs, with the signatures of `engine.kernels.cpu`.

Matrices are bf16 or fp16, [T, W] with W a multiple of 8 (`ALIGNED`); `column_sum` takes fp32 too. No function waits for
the device, and sums have the same bits on every card. Bytes that a launch moves, beside the least that any could, for
T tokens of 2-byte elements; G = `groups(T)` is at most 1/64 of T, so the sums' partial results add little:

    gelu             4 T W + 2 W                                the least
    gelu_backward    6 T W + 2 W + 4 G W, then 4 G W + 2 W      6 T W + 4 W
    geglu            6 T W, of x [T, 2 W]                       the least
    geglu_backward   10 T W                                     the least
    column_sum       2 T W + 4 G W, then 4 G W + 2 W            2 T W + 2 W

The reads of a bias by many blocks come from the cache.
Shape legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels.cuda.arguments import TYPES, WARP, Launcher, aligned, flat
from engine.kernels.cuda.column_sum import sum_partials

#: a row's elements must be a multiple of this
ALIGNED = 8
#: types of activations
LOW = {dtype: name for dtype, name in TYPES.items() if dtype != torch.float32}
#: threads a block
THREADS = 256
#: rows a block, where nothing is summed: four a thread, whose loads are under way together
BLOCK_ROWS = 32
#: fewest rows, and most groups of them, whose sums are made apart
GROUP_ROWS, GROUPS = 64, 128

if TYPE_CHECKING:
    from engine.kernels.cuda.arguments import Argument


def groups(rows: int) -> int:
    """In how many groups sums over so many rows are made."""
    return -(-rows // rows_of_group(rows))


def rows_of_group(rows: int) -> int:
    """Rows of each of these groups but the last."""
    return max(GROUP_ROWS, -(-rows // GROUPS))


def activation_kernels() -> list[str]:
    """Every kernel that `ActivationKernels` may launch."""
    names = [f"{name}<{low}, {THREADS}>" for low in LOW.values() for name in _ELEMENTWISE]
    names += [f"column_sum<{name}, {THREADS}>" for name in TYPES.values()]
    return names


_ELEMENTWISE = ("bias_gelu", "bias_gelu_backward", "geglu", "geglu_backward")


@dataclass(frozen=True)
class ActivationKernels:
    """The kernels' host side."""

    launch: Launcher

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`x @ weight.T + bias`; the product's epilogue adds the bias. x: [T, I], weight: [O, I], bias: [O]."""
        return F.linear(x, weight, bias)

    def gelu(self, x: Tensor, bias: Tensor) -> Tensor:
        """GELU of `x + bias`, one launch; x: [T, O], bias: [O]."""
        out = room(x, len(x), x.shape[1])
        self._over_rows("bias_gelu", x, [flat(x), flat(bias), flat(out)], x.shape[1], BLOCK_ROWS)
        return out

    def gelu_backward(self, grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x [T, O] and of bias [O] in `gelu(x, bias)`, each sum rounded once; two launches."""
        grad, grad_x, partial = aligned(grad), room(x, len(x), x.shape[1]), _partial(x)
        pointers = [flat(grad), flat(x), flat(bias), flat(grad_x), flat(partial)]
        self._over_rows("bias_gelu_backward", x, pointers, x.shape[1], rows_of_group(len(x)))
        return grad_x, sum_partials(self.launch, partial, bias.dtype)

    def geglu(self, x: Tensor) -> Tensor:
        """GELU of the first half of each row times the second half, one launch; [T, 2 O] to [T, O]."""
        x, width = aligned(x), x.shape[1] // 2
        out = room(x, len(x), width)
        self._over_rows("geglu", x, [flat(x), flat(out)], width, BLOCK_ROWS)
        return out

    def geglu_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of x [T, 2 O] in `geglu(x)`, one launch; grad: [T, O]."""
        grad, x = aligned(grad), aligned(x)
        grad_x = room(x, len(x), x.shape[1])
        self._over_rows("geglu_backward", x, [flat(grad), flat(x), flat(grad_x)], grad.shape[1], BLOCK_ROWS)
        return grad_x

    def column_sum(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, O] to [O] in `dtype`, the sum over rows in fp32; two launches."""
        x = aligned(x)
        partial = _partial(x)
        self._over_rows("column_sum", x, [flat(x), flat(partial)], x.shape[1], rows_of_group(len(x)))
        return sum_partials(self.launch, partial, dtype)

    def _over_rows(self, kernel: str, x: Tensor, pointers: list[ctypes.c_size_t], width: int, group_rows: int) -> None:
        """Launch a kernel of csrc/activation.cuh over [T, width], `group_rows` rows a block."""
        assert width % ALIGNED == 0
        tiles = -(-width // (WARP * (16 // x.element_size())))
        blocks = tiles * -(-len(x) // group_rows)
        arguments: list[Argument] = [*pointers, *(ctypes.c_int(size) for size in (len(x), width, group_rows))]
        if blocks:
            self.launch(f"{kernel}<{TYPES[x.dtype]}, {THREADS}>", blocks, THREADS, arguments, x.device)


def room(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A result to be written, on the device of a tensor and of its type unless another is named."""
    return like.new_empty(shape, dtype=dtype)


def _partial(x: Tensor) -> Tensor:
    """Room for the sums of groups of rows of `x`, [groups, O] fp32."""
    return room(x, groups(len(x)), x.shape[1], dtype=torch.float32)
