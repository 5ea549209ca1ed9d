"""Which ranges of the model's parameters lie in the tensors that a client optimizer's step() gets from DeepSpeed.

At stage 0 such a tensor is one whole parameter, or its fp32 master. ZeRO 1 to 3 hand over flat fp32 tensors that hold
pieces of many parameters, and padding. An optimizer that needs norms of whole parameters, as LAMB does, adds up
its pieces' sums of squares and reduces them over the ranks that have the other pieces; `shards` says which they are.
Pieces are read from DeepSpeed's own records and from memory, never computed from how DeepSpeed ought to cut; what
contradicts itself is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.optim.shard import Fragment, ParameterInfo, Shard
from engine.zero.swap import swap_of

#: the release whose layouts tests/zero/test_partition.py compares with the model's parameters
TESTED_DEEPSPEED = "0.19.8"


class _MismatchError(Exception):
    """A wrapper is not laid out as expected; the message says in what."""


def shards(engine: Any) -> list[Shard]:
    """The tensors that one optimizer step updates, each exactly once, in the order of the updates.

    Frozen parameters are in no shard; parameters without a gradient are, since ZeRO fills theirs with zeros. Every
    rank gets as many shards, in the same order. Valid until the engine moves its states (`offload_states`).

    Args:
        engine: what `deepspeed.initialize` returned for a client optimizer, at any stage and precision.

    Raises:
        UserError: the layout is unsupported or unknown.
    """
    wrapper = engine.optimizer
    names = {id(p): name for name, p in engine.module.named_parameters()}
    wrapper_name = type(wrapper).__name__
    read = _whole_parameters if isinstance(wrapper, torch.optim.Optimizer) else _READERS.get(wrapper_name)
    where = f"{wrapper_name} of DeepSpeed {metadata.version('deepspeed')}"
    if read is None:
        raise UserError(
            f"zero_optimization: the optimizer's tensors can't be mapped to parameters under {where}; "
            "use stage 0, 1, 2 or 3 without zenflow or super_offload, and with an optimizer of your own"
        )
    try:
        found = read(wrapper, names)
        for shard in found:
            _check_tensor(shard.tensor)
            _check_fragments(shard.fragments, shard.parameters, shard.numel)
    except _MismatchError as mismatch:
        raise UserError(
            f"deepspeed: the tensors of {where} are laid out in an unknown way ({mismatch}); "
            f"install deepspeed {TESTED_DEEPSPEED}, whose layouts are tested"
        ) from mismatch
    return found


def client_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that `deepspeed.initialize` was given, without the wrapper that DeepSpeed may put around it."""
    wrapper = engine.optimizer
    optimizer: torch.optim.Optimizer = wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer
    return optimizer


def window(fragments: Iterable[Fragment], begin: int, end: int) -> tuple[Fragment, ...]:
    """The fragments of flat[begin:end], from those of flat."""
    cut = []
    for piece in fragments:
        first, last = max(piece.start, begin), min(piece.start + piece.length, end)
        if first < last:
            skipped = first - piece.start
            cut.append(Fragment(piece.parameter, first - begin, last - first, piece.parameter_start + skipped))
    return tuple(cut)


def _whole_parameters(optimizer: Any, names: dict[int, str]) -> list[Shard]:
    """Stage 0 in fp32, where DeepSpeed wraps no optimizer: the model's parameters themselves."""
    return [
        _whole(p, p, index, names)
        for index, group in enumerate(optimizer.param_groups)
        for p in group["params"]
        if p.requires_grad and p.numel() > 0
    ]


def _whole_masters(wrapper: Any, names: dict[int, str]) -> list[Shard]:
    """Stage 0 in bf16 and fp16: an fp32 master of each parameter."""
    found = []
    for index, (group, params) in enumerate(_pairs(_stepped(wrapper), _get(wrapper, "fp16_groups"))):
        found += [_whole(master, p, index, names) for master, p in _pairs(group, params)]
    return found


def _whole(tensor: Tensor, parameter: Tensor, group: int, names: dict[int, str]) -> Shard:
    if tensor.shape != parameter.shape:
        raise _MismatchError(f"a master of {list(tensor.shape)} for a parameter of {list(parameter.shape)}")
    info = _info(parameter, parameter.shape, names)
    return Shard(tensor, group, (info,), (Fragment(0, 0, info.numel, 0),), None)


def _zero_1_2(wrapper: Any, names: dict[int, str]) -> list[Shard]:
    """ZeRO 1 and 2: of each group's flat buffer, this rank's equal part, whatever parameters that cuts."""
    if _get(wrapper, "round_robin_gradients"):
        raise UserError(
            "zero_optimization.round_robin_gradients: true makes DeepSpeed save and load the optimizer's state "
            "under wrong parameters; set it to false"
        )
    return _flat_groups(wrapper, "bit16_groups", names)


def _bf16(wrapper: Any, names: dict[int, str]) -> list[Shard]:
    """ZeRO 1 in bf16 with gradients accumulated in fp32, cut as in ZeRO 1 and 2."""
    return _flat_groups(wrapper, "bf16_groups", names)


def _flat_groups(wrapper: Any, groups: str, names: dict[int, str]) -> list[Shard]:
    """Shards of a wrapper that keeps every group whole in a flat buffer of its model's parameters on every rank.

    Where a parameter lies is seen from its memory, which is a view of that buffer: DeepSpeed may pad between them.
    """
    found = []
    flats, process_groups = _get(wrapper, groups + "_flat"), _get(wrapper, "real_dp_process_group")
    for index, (params, flat, stepped, process_group) in enumerate(
        _pairs(_get(wrapper, groups), flats, _stepped(wrapper), process_groups)
    ):
        if len(stepped) != 1:
            raise _MismatchError(f"group {index} steps {len(stepped)} tensors")
        infos = tuple(_info(p, p.shape, names) for p in params)
        whole = sorted((_place(number, p, flat) for number, p in enumerate(params)), key=lambda piece: piece.start)
        _check_fragments(whole, infos, flat.numel())
        rank, ranks = _rank_in(process_group)
        size = stepped[0].numel()
        if size * ranks != flat.numel():
            raise _MismatchError(f"{ranks} ranks step {size} elements each of {flat.numel()}")
        fragments = window(whole, rank * size, (rank + 1) * size)
        found.append(Shard(stepped[0], index, infos, fragments, process_group if ranks > 1 else None))
    return found


def _place(number: int, parameter: Tensor, flat: Tensor) -> Fragment:
    """Where the whole parameter lies in the buffer that its memory is a view of."""
    same = parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    if not same or parameter.dtype != flat.dtype or not parameter.is_contiguous():
        raise _MismatchError("a parameter is no view of its group's flat buffer")
    return Fragment(number, int(parameter.storage_offset() - flat.storage_offset()), parameter.numel(), 0)


def _zero_3(wrapper: Any, names: dict[int, str]) -> list[Shard]:
    """ZeRO 3: of each parameter its rank's equal part, the last ones padded; some parameters make a sub-group."""
    found = []
    tensors, process_groups = _get(wrapper, "fp32_partitioned_groups_flat"), _get(wrapper, "sub_group_process_groups")
    for index, (params, tensor, process_group) in enumerate(
        _pairs(_get(wrapper, "fp16_groups"), tensors, process_groups)
    ):
        rank, ranks = _rank_in(process_group)
        infos = tuple(_info(p, _get(p, "ds_shape"), names) for p in params)
        fragments = []
        for number, (p, info) in enumerate(_pairs(params, infos)):
            sub_group, start, size = _get(wrapper, "grad_position")[_get(wrapper, "get_param_id")(p)]
            if sub_group != index or not info.numel <= size * ranks < info.numel + ranks:
                raise _MismatchError(f"{ranks} ranks have {size} elements each of {info.name}, which has {info.numel}")
            valid = min(size, info.numel - rank * size)
            if valid > 0:
                fragments.append(Fragment(number, start, valid, rank * size))
        group = _get(wrapper, "sub_group_to_group_id")[index]
        shared = process_group if ranks > 1 else None
        swap = swap_of(wrapper, index) if _get(wrapper, "swap_optimizer") else None
        found.append(Shard(tensor, group, infos, tuple(fragments), shared, swap))
    return found


#: how to read each class that DeepSpeed wraps a client optimizer in; its subclasses lay out differently
_READERS: dict[str, Callable[[Any, dict[int, str]], list[Shard]]] = {
    "FP16_UnfusedOptimizer": _whole_masters,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer": _zero_1_2,
    "DeepSpeedZeroOptimizer_Stage3": _zero_3,
}


def _check_fragments(fragments: Sequence[Fragment], parameters: Sequence[ParameterInfo], size: int) -> None:
    """Fragments are ascending, disjoint, and inside of the tensor's `size` elements and of their parameters."""
    end = 0
    for piece in fragments:
        parameter = parameters[piece.parameter]
        if piece.start < end or piece.length <= 0:
            raise _MismatchError(f"{parameter.name} overlaps another parameter")
        end = piece.start + piece.length
        if end > size or piece.parameter_start + piece.length > parameter.numel:
            raise _MismatchError(f"{parameter.name} exceeds its tensor of {size} elements")


def _check_tensor(tensor: Tensor) -> None:
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise _MismatchError(f"the optimizer steps a tensor of {tensor.dtype}, not contiguous fp32")


def _stepped(wrapper: Any) -> list[list[Tensor]]:
    """The tensors of each group of the client optimizer."""
    return [group["params"] for group in _get(_get(wrapper, "optimizer"), "param_groups")]


def _rank_in(process_group: Any) -> tuple[int, int]:
    """This process's rank among the ranks of a group, and their number."""
    return torch.distributed.get_rank(process_group), torch.distributed.get_world_size(process_group)


def _info(parameter: Tensor, shape: Sequence[int], names: dict[int, str]) -> ParameterInfo:
    if id(parameter) not in names:
        raise _MismatchError("the optimizer has a parameter that the model lacks")
    return ParameterInfo(names[id(parameter)], tuple(shape))


def _get(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise _MismatchError(f"{type(owner).__name__} has no {name}")
    return getattr(owner, name)


def _pairs(*columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    if len({len(column) for column in columns}) != 1:
        raise _MismatchError(f"lists of {[len(column) for column in columns]} entries belong together")
    return list(zip(*columns, strict=True))
