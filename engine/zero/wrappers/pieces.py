"""Reading DeepSpeed's records: pieces are taken from them and from memory, and what contradicts itself is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.optim.shard import Fragment, ParameterInfo


class MismatchError(Exception):
    """A wrapper is not laid out as expected; the message says in what."""


def window(fragments: Iterable[Fragment], begin: int, end: int) -> tuple[Fragment, ...]:
    """The fragments of flat[begin:end], from those of flat."""
    cut = []
    for piece in fragments:
        first, last = max(piece.start, begin), min(piece.start + piece.length, end)
        if first < last:
            skipped = first - piece.start
            cut.append(Fragment(piece.parameter, first - begin, last - first, piece.parameter_start + skipped))
    return tuple(cut)


def check_fragments(fragments: Sequence[Fragment], parameters: Sequence[ParameterInfo], size: int) -> None:
    """Fragments are ascending, disjoint, and inside of the tensor's `size` elements and of their parameters."""
    end = 0
    for piece in fragments:
        parameter = parameters[piece.parameter]
        if piece.start < end or piece.length <= 0:
            raise MismatchError(f"{parameter.name} overlaps another parameter")
        end = piece.start + piece.length
        if end > size or piece.parameter_start + piece.length > parameter.numel:
            raise MismatchError(f"{parameter.name} exceeds its tensor of {size} elements")


def check_tensor(tensor: Tensor) -> None:
    """A tensor that the optimizer steps is contiguous and fp32."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise MismatchError(f"the optimizer steps a tensor of {tensor.dtype}, not contiguous fp32")


def stepped(optimizer: Any) -> list[list[Tensor]]:
    """The tensors of each group of the client optimizer."""
    return [group["params"] for group in attribute(attribute(optimizer, "optimizer"), "param_groups")]


def rank_in(process_group: Any) -> tuple[int, int]:
    """This process's rank among the ranks of a group, and their number."""
    return torch.distributed.get_rank(process_group), torch.distributed.get_world_size(process_group)


def info_of(parameter: Tensor, shape: Sequence[int], names: dict[int, str]) -> ParameterInfo:
    """A parameter of the model by its name in `names`, which has the `id` of each."""
    if id(parameter) not in names:
        raise MismatchError("the optimizer has a parameter that the model lacks")
    return ParameterInfo(names[id(parameter)], tuple(shape))


def attribute(owner: Any, name: str) -> Any:
    """What DeepSpeed's object has under a name that another release may not have."""
    if not hasattr(owner, name):
        raise MismatchError(f"{type(owner).__name__} has no {name}")
    return getattr(owner, name)


def pairs(*columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of columns that must be of one length."""
    if len({len(column) for column in columns}) != 1:
        raise MismatchError(f"lists of {[len(column) for column in columns]} entries belong together")
    return list(zip(*columns, strict=True))
