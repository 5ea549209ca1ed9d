"""ZeRO-Infinity's optimizer states (Rajbhandari et al. 2021): between steps they are in files and their tensors empty.

DeepSpeed reads each sub-group of stage 3 into buffers around its own step. Whatever else looks at the states, a
checkpoint or an export, does so inside of `Swap.reading` or `Swap.replacing`, one sub-group at a time: there are no
more buffers than for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError

#: bytes that the address of a read past the page cache is a multiple of
ALIGNED = 512
#: tensors of a sub-group in memory at a time: fp32 weights, gradient, two moments
BUFFERS = 4


@dataclass(frozen=True, eq=False)
class Swap:
    """A sub-group whose fp32 weights and states are in files between steps."""

    wrapper: Any
    """DeepSpeed's stage 3 optimizer"""
    sub_group: int
    numel: int
    """elements that the sub-group's tensor has while it is in memory"""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The weights and states are in memory inside; what is changed there is lost."""
        self.wrapper._optimizer_states_and_gradient_swap_in(self.sub_group)
        try:
            yield
        finally:
            self.wrapper._release_swap_buffers(self.sub_group)

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """The weights are in memory inside, and without states; afterwards both are written as they then are."""
        wrapper = self.wrapper
        tensor = wrapper.fp32_partitioned_groups_flat[self.sub_group]
        wrapper.optimizer.state.pop(tensor, None)
        record = wrapper.optimizer_swapper.swap_params_info[tensor.ds_id]
        record.tensors, record.has_state_tensors = record.tensors[:1], False
        wrapper._optimizer_states_and_gradient_swap_in(self.sub_group)
        try:
            yield
        except BaseException:
            wrapper._release_swap_buffers(self.sub_group)
            raise
        wrapper._optimizer_states_and_gradient_swap_out(self.sub_group)


def swap_of(wrapper: Any, sub_group: int) -> Swap | None:
    """How a sub-group of an optimizer on NVMe is swapped; None if it is below 1 MiB a rank, and so stays in memory.

    Raises:
        UserError: DeepSpeed's pipelined swapping, which reads the next sub-group ahead into buffers of its own, or
            too few buffers.
    """
    swapper, section = wrapper.optimizer_swapper, "zero_optimization.offload_optimizer"
    if type(swapper).__name__ != "PartitionedOptimizerSwapper":
        raise UserError(f"{section}: pipeline_read and pipeline_write aren't supported; set both to false")
    if swapper.swap_config.buffer_count < BUFFERS:
        raise UserError(
            f"{section}.buffer_count: {swapper.swap_config.buffer_count} is too few for fp32 weights, gradient and two "
            f"moments; give {BUFFERS}"
        )
    if not wrapper._swappable_optimizer_subgroup(sub_group):
        return None
    return Swap(wrapper, sub_group, int(wrapper.fp16_partitioned_groups_flat_numel[sub_group]))


def mend_gradients(wrapper: Any) -> None:
    """Make DeepSpeed 0.19.8 step an offloaded sub-group with its gradient, which it gets wrong in two ways.

    Args:
        wrapper: DeepSpeed's stage 3 optimizer, with its states on the CPU or NVMe.
    """
    if wrapper.swap_optimizer:
        _read_aligned(wrapper.optimizer_swapper)
    _clear_missing(wrapper)


def _read_aligned(swapper: Any) -> None:
    """Read the pieces of a gradient that don't begin at an aligned address by way of a buffer.

    DeepSpeed reads each piece straight to its place. Where sizes before it are odd, as a bias cut over 8 ranks is, a
    direct read puts other values there, without an error.
    """
    from deepspeed.runtime.swap_tensor.utils import swap_in_tensors

    read_in_place = swapper._swap_in_pinned_gradients

    def read(aio_handle: Any, parameter: Tensor, gradient: Tensor) -> None:
        pieces = list(swapper.swap_params_info[parameter.ds_id].swapped_gradients.values())  # type: ignore[attr-defined]
        places = [gradient[piece.offset : piece.offset + piece.length] for piece in pieces]
        if all(place.data_ptr() % ALIGNED == 0 for place in places):
            read_in_place(aio_handle, parameter, gradient)
            return
        for piece, place in zip(pieces, places, strict=True):
            pageable = torch.empty_like(place, pin_memory=False)  # DeepSpeed reads it into an aligned one, and copies
            swap_in_tensors(aio_handle, [pageable], [piece.path])
            assert aio_handle.wait() == 1, f"{piece.path} can't be read"
            place.copy_(pageable)

    swapper._swap_in_pinned_gradients = read


def _clear_missing(wrapper: Any) -> None:
    """Make the gradient of a parameter that took no part in the global batch zero, as ZeRO 1 has it.

    DeepSpeed leaves there what an earlier step wrote, or on NVMe whatever the buffer held. The parameters that it has
    gradient norms of are those that took part.
    """
    prepare = wrapper._prepare_sub_group

    def prepare_all(sub_group: int, timer_names: Any) -> None:
        prepare(sub_group, timer_names)
        tensor = wrapper.fp32_partitioned_groups_flat[sub_group]
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
        for parameter in wrapper.fp16_groups[sub_group]:
            key = wrapper.get_param_id(parameter)
            if key not in wrapper.norm_for_param_grads:
                _, start, size = wrapper.grad_position[key]
                tensor.grad[start : start + size].zero_()

    wrapper._prepare_sub_group = prepare_all
