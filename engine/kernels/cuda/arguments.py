"""What the host sides of all CUDA kernels share: names of types, and arguments as `cuLaunchKernel` takes them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

#: the kernels' names for the types
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}

#: threads of a warp, and bytes that a thread moves at once
WARP, PACK = 32, 16

if TYPE_CHECKING:
    #: a kernel's argument with its C type; cuda-core takes addresses as integers
    Argument: TypeAlias = ctypes._SimpleCData[Any]


class Launcher(Protocol):
    """Runs a kernel by its C++ name on a grid of blocks; `nvrtc.launch`, or the tests' emulator."""

    def __call__(
        self, kernel: str, blocks: int, threads: int, arguments: Sequence[Argument], device: torch.device
    ) -> None: ...


def pointer(tensor: Tensor | None, dtype: torch.dtype | None = None) -> ctypes.c_size_t:
    """The address of the first element, of that type where one is named; null for None."""
    assert dtype is None or tensor is None or tensor.dtype == dtype
    return ctypes.c_size_t(0 if tensor is None else tensor.data_ptr())


def flat(buffer: Tensor | None) -> ctypes.c_size_t:
    """The address of a contiguous tensor; null for None."""
    assert buffer is None or buffer.is_contiguous()
    return pointer(buffer)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, contiguous from 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor if pointer(tensor).value % PACK == 0 else tensor.clone()
