"""ZeRO 1 and 2: flat buffers that are whole on every rank, of which each steps its equal part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from engine.errors import UserError
from engine.optim.fused import FusedOptimizer
from engine.optim.shard import Fragment, Shard
from engine.zero.wrappers.base import Wrapper, own_precision
from engine.zero.wrappers.pieces import (
    MismatchError,
    attribute,
    check_fragments,
    info_of,
    pairs,
    rank_in,
    stepped,
    window,
)


class FlatWrapper(Wrapper):
    """Of each group's flat buffer this rank's equal part, whatever parameters that cuts."""

    #: DeepSpeed's name for the groups of the model's own parameters
    groups: str

    def read_shards(self, names: dict[int, str]) -> list[Shard]:
        """Where a parameter lies is seen from its memory, a view of that buffer: DeepSpeed may pad between them."""
        optimizer, shards = self.optimizer, []
        flats = attribute(optimizer, self.groups + "_flat")
        process_groups = attribute(optimizer, "real_dp_process_group")
        for index, (params, flat, tensors, process_group) in enumerate(
            pairs(attribute(optimizer, self.groups), flats, stepped(optimizer), process_groups)
        ):
            if len(tensors) != 1:
                raise MismatchError(f"group {index} steps {len(tensors)} tensors")
            infos = tuple(info_of(p, p.shape, names) for p in params)
            whole = sorted((_place(number, p, flat) for number, p in enumerate(params)), key=lambda piece: piece.start)
            check_fragments(whole, infos, flat.numel())
            rank, ranks = rank_in(process_group)
            size = tensors[0].numel()
            if size * ranks != flat.numel():
                raise MismatchError(f"{ranks} ranks step {size} elements each of {flat.numel()}")
            fragments = window(whole, rank * size, (rank + 1) * size)
            shards.append(Shard(tensors[0], index, infos, fragments, process_group if ranks > 1 else None))
        return shards

    def round_weights(self, shards: Sequence[Shard]) -> None:
        """DeepSpeed's views of the optimizer's state are of the old one, if there are any yet."""
        optimizer = self.optimizer
        optimizer.update_lp_params()
        optimizer._hp_optimizer_states_linked = False
        if optimizer.optimizer.state:
            optimizer._lazy_init_hp_params_optimizer_state()


class Zero12Wrapper(FlatWrapper):
    """`DeepSpeedZeroOptimizer`."""

    groups = "bit16_groups"

    @property
    def reductions(self) -> list[tuple[Any, str]]:
        return [*super().reductions, (self.optimizer, "reduce_ready_partitions_and_remove_grads")]

    def read_shards(self, names: dict[int, str]) -> list[Shard]:
        if attribute(self.optimizer, "round_robin_gradients"):
            raise UserError(
                "zero_optimization.round_robin_gradients: true makes DeepSpeed save and load the optimizer's state "
                "under wrong parameters; set it to false"
            )
        return super().read_shards(names)


class Bf16Wrapper(FlatWrapper):
    """`BF16_Optimizer`: ZeRO 1 in bf16 with gradients accumulated in fp32."""

    groups = "bf16_groups"

    def gradients(self, shards: Sequence[Shard]) -> Sequence[Tensor | None]:
        gradients: Sequence[Tensor] = self.optimizer.fp32_groups_gradient_flat_partition
        return gradients

    def take_clipping(self, client: FusedOptimizer) -> None:
        """No loss scale; DeepSpeed clips if `clip_grad` is positive, after storing the norm."""
        optimizer = self.optimizer
        limit, optimizer.clip_grad = optimizer.clip_grad, 0.0

        def scale() -> Tensor | float:
            if not limit:
                return 1.0
            norm = own_precision(optimizer._global_grad_norm)
            factor: Tensor = (limit / (norm + 1e-6)).clamp(max=1.0)
            return factor

        client.scale = scale


def _place(number: int, parameter: Tensor, flat: Tensor) -> Fragment:
    """Where the whole parameter lies in the buffer that its memory is a view of."""
    same = parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    if not same or parameter.dtype != flat.dtype or not parameter.is_contiguous():
        raise MismatchError("a parameter is no view of its group's flat buffer")
    return Fragment(number, int(parameter.storage_offset() - flat.storage_offset()), parameter.numel(), 0)
