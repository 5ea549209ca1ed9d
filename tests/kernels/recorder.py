"""What a step asks of a GPU, recorded on fake tensors: which operators, and whether one would wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: operators that launch nothing: views, and memory alone
FREE = ("view", "alias", "detach", "t", "transpose", "unflatten", "empty", "slice", "select", "unbind", "expand")
FREE += ("unsqueeze", "squeeze", "_unsafe_view", "as_strided", "permute", "new_empty", "empty_like", "split", "narrow")
FREE += ("lift_fresh", "empty_strided", "new_empty_strided")
#: operators whose result's size, or whose value on the host, hangs on what the device has computed
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")


class Recorder(TorchDispatchMode):
    """Keeps each operator with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        self.calls.append((name, args, kwargs or {}))
        across = len({tensor.device.type for tensor in tensors(args, kwargs, result) if tensor.ndim}) > 1
        if name in WAITING or across:
            self.waits.append(name)
        return result

    def launches(self) -> list[str]:
        """The operators that make the device work."""
        return [name for name, *_ in self.calls if name not in FREE]

    def calls_of(self, wanted: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of each call of an operator."""
        return [(args, kwargs) for name, args, kwargs in self.calls if name == wanted]


def tensors(*trees: Any) -> Iterator[Tensor]:
    """The tensors in containers."""
    return (leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor))
