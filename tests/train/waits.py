"""A mode that notes every operator for which the host would wait for a GPU, and who called it.

What would lie on a GPU lies on torch's device "meta" here, whose tensors have no data; `waits` can also treat CPU
tensors as if they were a GPU's, where code must compute.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import ROOT

#: operators whose result is on the host, or whose size is known on the device alone
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "equal", "is_nonzero", "item",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPYING = {"_to_copy", "copy_"}
#: what copies numbers of the host from pageable memory; no operator shows it
MAKING = {torch.tensor, torch.as_tensor}


class Waits(TorchDispatchMode):
    """Notes waits for tensors of a type of device.

    Attributes:
        found: of each wait, the operator and the innermost caller in this project or DeepSpeed, "file:line".
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: list[tuple[str, str]] = []
        self._made = _Made(self)

    def __enter__(self) -> Self:
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::").split(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._waits(name, tensors, args, kwargs):
            self.found.append((name, caller()))
            if name == "_local_scalar_dense" and tensors[0].device.type == "meta":
                return 1.0 if tensors[0].is_floating_point() else 1
        return function(*args, **kwargs)

    def _waits(self, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
        mine = [tensor for tensor in tensors if tensor.device.type == self.device]
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            return bool(mine)
        if name in INDEXING:
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1] if mine)
        if name not in COPYING:
            return False
        source = tensors[-1].device.type if name == "copy_" else tensors[0].device.type
        target = tensors[0].device.type if name == "copy_" else torch.device(kwargs.get("device") or source).type
        non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        return self.device in (source, target) and source != target and not (non_blocking and target == self.device)


class _Made(TorchFunctionMode):
    """Notes tensors that are made of the host's numbers on the device of `waits`."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        numbers = function in MAKING and device is not None and not isinstance(args[0], Tensor)
        if numbers and torch.device(device).type == self.waits.device:
            self.waits.found.append((function.__name__, caller()))
        return function(*args, **kwargs)


def caller() -> str:
    """The innermost frame in this project's packages or DeepSpeed."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "deepspeed" in path.parts:
            return f"deepspeed/{path.name}:{frame.f_lineno}"
        if path.is_relative_to(ROOT / "engine") or (path.is_relative_to(ROOT / "tests") and path != Path(__file__)):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
