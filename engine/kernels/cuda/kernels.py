"""The kernels on GPUs, with the signatures of `engine.kernels.reference`.

No function waits for the device. A target that is neither a class nor `ignore_index` is never used as an address: its
row's loss and gradient become NaN.
Shape legend: R rows, V classes, C chunks, S segments.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.kernels.cuda import normalisation, nvrtc
from engine.kernels.cuda.activations import ActivationKernels, activation_kernels
from engine.kernels.cuda.arguments import TYPES, flat, pointer
from engine.kernels.cuda.column_sum import sum_kernels
from engine.kernels.segments import Segments
from engine.kernels.terms import Adam, Trust

COPY_TYPES = {dtype: name for dtype, name in TYPES.items() if dtype != torch.float32}
#: threads a block
CHUNK_THREADS = 256
ROW_THREADS = 1024
#: rows of at most this many classes get blocks of `CHUNK_THREADS`
SHORT_ROW = 8192
#: 16-byte packs a thread may keep in registers; 8 packs of 16-bit elements would spill
REGISTER_PACKS = {torch.float32: (4, 8), torch.bfloat16: (4,), torch.float16: (4,)}

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from engine.kernels.cuda.arguments import Argument


@functools.cache
def available() -> bool:
    """Whether cuda-core is installed; if not, one line of warning tells what to do."""
    found = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None
    if not found:
        logger.warning("CUDA kernels: %s; plain torch runs instead", nvrtc.MISSING)
    return found


def xent_kernel(dtype: torch.dtype, classes: int) -> tuple[str, int]:
    """The cross-entropy kernel for rows of `classes`, and its threads a block."""
    name = TYPES[dtype]
    if classes <= SHORT_ROW:
        return f"xent_streaming<{name}, {CHUNK_THREADS}>", CHUNK_THREADS
    for packs in REGISTER_PACKS[dtype]:
        if classes <= ROW_THREADS * packs * (16 // dtype.itemsize):
            return f"xent_registers<{name}, {ROW_THREADS}, {packs}>", ROW_THREADS
    return f"xent_streaming<{name}, {ROW_THREADS}>", ROW_THREADS


def all_kernels() -> list[str]:
    """Every kernel that these functions may launch."""
    names = [f"norm_of_chunks<{ROW_THREADS}>", f"lamb_ratios<{CHUNK_THREADS}>", f"lamb_squares<{CHUNK_THREADS}>"]
    for dtype, grad in TYPES.items():
        names += [f"xent_streaming<{grad}, {threads}>" for threads in (CHUNK_THREADS, ROW_THREADS)]
        names += [f"xent_registers<{grad}, {ROW_THREADS}, {packs}>" for packs in REGISTER_PACKS[dtype]]
        names += [f"squared_norms<{grad}, {CHUNK_THREADS}>", f"lamb_moments<{grad}, {CHUNK_THREADS}>"]
    for grad, copy in itertools.product(TYPES.values(), COPY_TYPES.values()):
        names += [f"adamw<{grad}, {copy}, {CHUNK_THREADS}>", f"lamb_update<{grad}, {copy}, {CHUNK_THREADS}>"]
    return names + activation_kernels() + normalisation.all_kernels() + sum_kernels()


@dataclass(frozen=True)
class CudaKernels(ActivationKernels, normalisation.LayerNormKernels):
    """The kernels' host side."""

    def softmax_cross_entropy_(
        self,
        logits: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scale: Tensor,
        *,
        ignore_index: int,
        label_smoothing: float,
        gradient: bool,
        in_range: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.softmax_cross_entropy_`; without a bias. Rows may be strided, not their elements.

        `in_range`, [] int32, becomes 0 where a target is neither a class nor `ignore_index`.
        """
        assert bias is None
        rows, classes = logits.shape
        assert logits.stride(1) == 1 or classes == 1
        loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
        hit = torch.empty(rows, dtype=torch.bool, device=logits.device)
        target = target.contiguous()
        kernel, threads = xent_kernel(logits.dtype, classes)
        arguments: list[Argument] = [
            pointer(logits),
            ctypes.c_longlong(logits.stride(0)),
            ctypes.c_int(classes),
            pointer(target, torch.int64),
            pointer(scale, torch.float32),
            pointer(loss),
            pointer(hit),
            pointer(in_range, torch.int32),
            ctypes.c_longlong(ignore_index),
            ctypes.c_float(label_smoothing),
            ctypes.c_bool(gradient),
        ]
        if rows:
            self.launch(kernel, rows, threads, arguments, logits.device)
        return loss, hit, loss.new_empty(0)

    def global_norm(self, grad: Tensor, segments: Segments) -> Tensor:
        """See `reference.global_norm`; two launches."""
        chunks = len(segments.begin)
        partial = torch.empty(chunks, dtype=torch.float32, device=grad.device)
        norm = torch.empty((), dtype=torch.float32, device=grad.device)
        if chunks:
            kernel = f"squared_norms<{TYPES[grad.dtype]}, {CHUNK_THREADS}>"
            squares = [flat(grad), pointer(segments.begin), pointer(segments.size), pointer(partial)]
            self.launch(kernel, chunks, CHUNK_THREADS, squares, grad.device)
        total: list[Argument] = [pointer(partial), ctypes.c_int(chunks), pointer(norm)]
        self.launch(f"norm_of_chunks<{ROW_THREADS}>", 1, ROW_THREADS, total, grad.device)
        return norm

    def adamw_step_(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        copy: Tensor | None,
        segments: Segments,
        adam: Adam,
        grad_scale: Tensor,
    ) -> Tensor:
        """See `reference.adamw_step_`; one launch, after four bytes are cleared."""
        nonfinite = torch.zeros((), dtype=torch.int32, device=param.device)
        arguments: list[Argument] = [
            *(flat(buffer) for buffer in (param, grad, exp_avg, exp_avg_sq)),
            flat(copy),
            *_chunks(segments),
            ctypes.c_float(adam.lr),
            *_adam(adam, grad_scale),
            pointer(nonfinite),
        ]
        self._over_chunks(f"adamw<{_types(grad, copy)}, {CHUNK_THREADS}>", segments, arguments, param.device)
        return nonfinite

    def lamb_step_(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        copy: Tensor | None,
        segments: Segments,
        adam: Adam,
        grad_scale: Tensor,
        trust: Trust,
    ) -> tuple[Tensor, Tensor]:
        """See `reference.lamb_step_`; three launches, after four bytes are cleared."""
        nonfinite, partial = self._lamb_partial(param, grad, exp_avg, exp_avg_sq, segments, adam, grad_scale)
        ratio = torch.empty(len(segments.length), dtype=torch.float32, device=param.device)
        arguments: list[Argument] = [
            pointer(partial),
            pointer(segments.first),
            pointer(segments.weight_decay),
            pointer(segments.trust),
            ctypes.c_float(trust.bound),
            ctypes.c_bool(trust.nvlamb),
            pointer(ratio),
        ]
        if len(ratio):
            self.launch(f"lamb_ratios<{CHUNK_THREADS}>", len(ratio), CHUNK_THREADS, arguments, param.device)
        self.lamb_apply_(param, grad, exp_avg, exp_avg_sq, copy, segments, adam, grad_scale, ratio, nonfinite)
        return nonfinite, ratio

    def lamb_moments_(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        segments: Segments,
        adam: Adam,
        grad_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `reference.lamb_moments_`; two launches, after four bytes are cleared."""
        nonfinite, partial = self._lamb_partial(param, grad, exp_avg, exp_avg_sq, segments, adam, grad_scale)
        squares = torch.empty((len(segments.length), 2), dtype=torch.float64, device=param.device)
        arguments: list[Argument] = [pointer(partial), pointer(segments.first), pointer(squares)]
        if len(squares):
            self.launch(f"lamb_squares<{CHUNK_THREADS}>", len(squares), CHUNK_THREADS, arguments, param.device)
        return nonfinite, squares

    def _lamb_partial(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        segments: Segments,
        adam: Adam,
        grad_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Update the moments; nonfinite, and the squared norms of weights and update over each chunk, [C, 2] fp32."""
        nonfinite = torch.zeros((), dtype=torch.int32, device=param.device)
        partial = torch.empty((len(segments.begin), 2), dtype=torch.float32, device=param.device)
        arguments: list[Argument] = [
            *(flat(buffer) for buffer in (param, grad, exp_avg, exp_avg_sq)),
            *_chunks(segments),
            *_adam(adam, grad_scale),
            pointer(partial),
            pointer(nonfinite),
        ]
        self._over_chunks(f"lamb_moments<{TYPES[grad.dtype]}, {CHUNK_THREADS}>", segments, arguments, param.device)
        return nonfinite, partial

    def lamb_apply_(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        copy: Tensor | None,
        segments: Segments,
        adam: Adam,
        grad_scale: Tensor,
        ratio: Tensor,
        nonfinite: Tensor,
    ) -> None:
        """See `reference.lamb_apply_`; one launch."""
        arguments: list[Argument] = [
            *(flat(buffer) for buffer in (param, grad, exp_avg, exp_avg_sq)),
            flat(copy),
            *_chunks(segments),
            ctypes.c_float(adam.lr),
            *_adam(adam, grad_scale),
            pointer(ratio.contiguous(), torch.float32),
            pointer(nonfinite, torch.int32),
        ]
        self._over_chunks(f"lamb_update<{_types(grad, copy)}, {CHUNK_THREADS}>", segments, arguments, param.device)

    def _over_chunks(
        self, kernel: str, segments: Segments, arguments: Sequence[Argument], device: torch.device
    ) -> None:
        """Launch a block a chunk, if there is any."""
        if len(segments.begin):
            self.launch(kernel, len(segments.begin), CHUNK_THREADS, arguments, device)


def _types(grad: Tensor, copy: Tensor | None) -> str:
    """Template arguments for gradients and copy; without a copy any type of it will do."""
    return f"{TYPES[grad.dtype]}, {COPY_TYPES[torch.bfloat16 if copy is None else copy.dtype]}"


def _chunks(segments: Segments) -> list[ctypes.c_size_t]:
    """`CHUNK_PARAMETERS` of csrc/optimizer.cuh."""
    return [pointer(table) for table in (segments.begin, segments.size, segments.owner, segments.weight_decay)]


def _adam(adam: Adam, grad_scale: Tensor) -> list[Argument]:
    """`ADAM_PARAMETERS` of csrc/optimizer.cuh."""
    return [pointer(grad_scale, torch.float32), *(ctypes.c_float(constant) for constant in adam.constants())]


_kernels = CudaKernels(nvrtc.launch)
softmax_cross_entropy_ = _kernels.softmax_cross_entropy_
global_norm = _kernels.global_norm
adamw_step_ = _kernels.adamw_step_
lamb_step_ = _kernels.lamb_step_
lamb_moments_ = _kernels.lamb_moments_
lamb_apply_ = _kernels.lamb_apply_
column_sum = _kernels.column_sum
geglu = _kernels.geglu
geglu_backward = _kernels.geglu_backward
gelu = _kernels.gelu
gelu_backward = _kernels.gelu_backward
linear = _kernels.linear
layer_norm = _kernels.layer_norm
layer_norm_backward = _kernels.layer_norm_backward
