"""Dropout, residual sum and layer normalisation on GPUs; the sources are csrc/layer_norm.cuh and csrc/column_sum.cuh.

Bytes of global memory a token, for elements of s bytes; each is the least that must be moved, but for the statistics
and the partial sums:

    forward     read x and residual, write z and the result: 4 H s; without a residual 2 H s; 8 of statistics
    backward    read the result's gradient and z, write the sum's gradient: 3 H s, H s more where something of x was
                dropped (x has its own gradient then), and where z has a gradient from elsewhere; 8 of statistics

and once a call, for at most 256 blocks, 16 H bytes a block: partial sums of the parameters' gradients, written and
read. Launches: one forward, two backward.
Shape legend: T tokens, H width, P blocks of the backward pass.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.kernels.cuda.arguments import PACK, TYPES, WARP, Launcher, aligned, flat
from engine.kernels.cuda.column_sum import sum_partials
from engine.kernels.terms import Dropout

#: threads a block
ROW_THREADS = 128
#: threads that share a row, and packs that each of them may hold, the narrowest first; more packs would spill
TEAMS = ((WARP, 2), (WARP, 3), (WARP, 4), (ROW_THREADS, 2))
#: blocks of the backward pass at most: all of them run at once on an A100 or H100; not the card's number of
#: multiprocessors, so that the sums' bits are the same on every card
BLOCKS = 256

if TYPE_CHECKING:
    from engine.kernels.cuda.arguments import Argument


def normalises(tensor: Tensor) -> bool:
    """Whether a tensor [T, H] is one that the kernels read as it is: whole packs at 16 bytes, in rows that fit.

    Memory of torch's allocator starts at 16 bytes, so its offset tells, of a fake tensor too.
    """
    if tensor.ndim != 2 or tensor.dtype not in TYPES or not tensor.is_contiguous() or not tensor.numel():
        return False
    size, width = tensor.dtype.itemsize, tensor.shape[1]
    team, packs = TEAMS[-1]
    return (
        width * size % PACK == 0 and width * size <= team * packs * PACK and tensor.storage_offset() * size % PACK == 0
    )


def all_kernels() -> list[str]:
    """Every kernel that these functions may launch."""
    names = []
    for name in TYPES.values():
        shapes = [f"{name}, {ROW_THREADS}, {team}, {packs}" for team, packs in TEAMS]
        names += [f"{kernel}<{shape}>" for shape in shapes for kernel in ("layer_norm", "layer_norm_backward")]
    return names


@dataclass(frozen=True)
class LayerNormKernels:
    """The kernels' host side, with the signatures of `engine.kernels.cpu.layers`."""

    launch: Launcher

    def layer_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        inner: Dropout,
        outer: Dropout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise `inner(x) + residual`, then apply `outer`; see `engine.kernels.cpu.layers.layer_norm`. One launch.

        Args:
            x, residual: [T, H], as `normalises` wants them.
            weight, bias: [H], as `x`, at any address.
        """
        assert residual is not None or inner.probability == 0.0
        assert all(tensor is None or tensor.dtype == x.dtype for tensor in (residual, weight, bias))
        rows, width = x.shape
        z, out = x if residual is None else torch.empty_like(x), torch.empty_like(x)
        statistics = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        arguments: list[Argument] = [
            _at_pack(x),
            _at_pack(residual),
            flat(weight),
            flat(bias),
            _at_pack(None if residual is None else z),
            _at_pack(out),
            flat(statistics),
            ctypes.c_longlong(rows),
            ctypes.c_int(width),
            ctypes.c_float(eps),
            *_dropouts(inner, outer),
        ]
        shape, a_block = _shape(x)
        self.launch(f"layer_norm<{shape}>", -(-rows // a_block), ROW_THREADS, arguments, x.device)
        return out, z, statistics

    def layer_norm_backward(
        self,
        grad: Tensor,
        z: Tensor,
        weight: Tensor,
        statistics: Tensor,
        inner: Dropout,
        outer: Dropout,
        grad_z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `engine.kernels.cpu.layers.layer_norm_backward`; gradients of weight and bias in the weight's type.

        Two launches, and a copy of gradients that aren't contiguous from 16 bytes on.
        """
        grad, grad_z = aligned(grad), None if grad_z is None else aligned(grad_z)
        assert all(tensor is None or tensor.dtype == z.dtype for tensor in (grad, grad_z, weight))
        (rows, width), (shape, a_block) = z.shape, _shape(z)
        blocks = min(BLOCKS, -(-rows // a_block))
        grad_sum = torch.empty_like(z)
        grad_x = torch.empty_like(z) if inner.probability else None
        partial = torch.empty(blocks, 2, width, dtype=torch.float32, device=z.device)
        arguments: list[Argument] = [
            *(_at_pack(tensor) for tensor in (grad, grad_z, z)),
            flat(weight),
            flat(statistics),
            *(_at_pack(tensor) for tensor in (grad_x, grad_sum, partial)),
            ctypes.c_longlong(rows),
            ctypes.c_int(width),
            ctypes.c_int(blocks),
            *_dropouts(inner, outer),
        ]
        self.launch(f"layer_norm_backward<{shape}>", blocks, ROW_THREADS, arguments, z.device)
        grad_weight, grad_bias = sum_partials(self.launch, partial.flatten(1), weight.dtype).view(2, width).unbind()
        return grad_sum if grad_x is None else grad_x, grad_sum, grad_weight, grad_bias


def _shape(rows: Tensor) -> tuple[str, int]:
    """Template arguments for rows [T, H], and the rows that a block takes at a time."""
    size = rows.shape[1] * rows.dtype.itemsize
    team, packs = next((team, packs) for team, packs in TEAMS if size <= team * packs * PACK)
    return f"{TYPES[rows.dtype]}, {ROW_THREADS}, {team}, {packs}", ROW_THREADS // team


def _dropouts(*dropouts: Dropout) -> list[Argument]:
    """`NORM_DROPOUTS` of csrc/layer_norm.cuh."""
    arguments: list[Argument] = []
    for seed, threshold, scale in (dropout.constants() for dropout in dropouts):
        arguments += [ctypes.c_uint(seed), ctypes.c_uint(threshold), ctypes.c_float(scale)]
    return arguments


def _at_pack(tensor: Tensor | None) -> ctypes.c_size_t:
    """The address of a contiguous tensor, at 16 bytes; null for None."""
    address = flat(tensor)
    assert address.value % PACK == 0
    return address
