"""ZeRO 3: of each parameter its rank's equal part, the last ones padded; some parameters make a sub-group."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from engine.optim.shard import Fragment, Shard
from engine.zero.swap import mend_gradients, swap_of
from engine.zero.wrappers.base import Wrapper
from engine.zero.wrappers.pieces import MismatchError, attribute, info_of, pairs, rank_in


class Zero3Wrapper(Wrapper):
    """`DeepSpeedZeroOptimizer_Stage3`."""

    @property
    def is_swapped(self) -> bool:
        return bool(attribute(self.optimizer, "swap_optimizer"))

    @property
    def reductions(self) -> list[tuple[Any, str]]:
        return [*super().reductions, (self.optimizer, "reduce_ready_partitions_and_remove_grads")]

    def repair(self) -> None:
        if getattr(self.optimizer, "offload_optimizer", False):
            mend_gradients(self.optimizer)

    def read_shards(self, names: dict[int, str]) -> list[Shard]:
        optimizer, shards = self.optimizer, []
        tensors = attribute(optimizer, "fp32_partitioned_groups_flat")
        process_groups = attribute(optimizer, "sub_group_process_groups")
        for index, (params, tensor, process_group) in enumerate(
            pairs(attribute(optimizer, "fp16_groups"), tensors, process_groups)
        ):
            infos = tuple(info_of(p, attribute(p, "ds_shape"), names) for p in params)
            rank, ranks = rank_in(process_group)
            fragments = []
            for number, (p, info) in enumerate(pairs(params, infos)):
                sub_group, start, size = self._position(p)
                if sub_group != index or not info.numel <= size * ranks < info.numel + ranks:
                    have = f"{ranks} ranks have {size} elements each of {info.name}"
                    raise MismatchError(f"{have}, which has {info.numel}")
                valid = min(size, info.numel - rank * size)
                if valid > 0:
                    fragments.append(Fragment(number, start, valid, rank * size))
            group = attribute(optimizer, "sub_group_to_group_id")[index]
            shared = process_group if ranks > 1 else None
            swap = swap_of(optimizer, index) if self.is_swapped else None
            shards.append(Shard(tensor, group, infos, tuple(fragments), shared, swap))
        return shards

    def _position(self, parameter: Any) -> tuple[int, int, int]:
        """Sub-group, first element there and elements of this rank's part, padding too."""
        position: tuple[int, int, int] = attribute(self.optimizer, "grad_position")[
            attribute(self.optimizer, "get_param_id")(parameter)
        ]
        return position

    def round_weights(self, shards: Sequence[Shard]) -> None:
        self.optimizer.checkpoint_event_prologue()  # partitions what is gathered
        for sub_group, shard in enumerate(shards):
            with shard.reading():
                self.optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        # Gathers the small parameters again that stay whole between steps.
        self.optimizer.checkpoint_event_epilogue()

    def swapped_weights(self, *, keep: bool) -> dict[int, Tensor]:
        """Each file is read once, where DeepSpeed's own functions read a whole sub-group for each of its parameters."""
        optimizer, weights = self.optimizer, {}
        for sub_group, shard in enumerate(self.shards() if self.is_swapped else ()):
            if shard.swap is None:
                continue
            with shard.reading():
                for parameter in optimizer.fp16_groups[sub_group]:
                    _, start, size = self._position(parameter)
                    part = shard.tensor.detach()[start : start + size].to(self.engine.device)
                    full = optimizer._fp32_state_allgather(parameter, part)
                    weights[id(parameter)] = full.cpu().clone() if keep else torch.empty(0)
        return weights

    def gathered(self, parameter: Any, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        """A parameter that stays whole between steps is left so: DeepSpeed would partition it afterwards."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

        is_whole = parameter.ds_status == ZeroParamStatus.AVAILABLE
        if is_whole and modifier_rank is None:
            return nullcontext()
        context: AbstractContextManager[Any] = GatheredParameters(parameter, modifier_rank=modifier_rank)
        return context

    def shape_of(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)
