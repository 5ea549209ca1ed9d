"""Launches of a layer as they are counted, against what the real model asks of a GPU.

The model lies on torch's device "meta", whose tensors have no data, and launches of the CUDA kernels are only noted.
What attention asks is its own operators' matter: a stand-in takes their place.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig

from engine.config import ModelConfig
from engine.kernels import cuda, dispatch
from engine.kernels.cuda import kernels as host_side
from engine.kernels.cuda.selfcheck import FAMILIES
from engine.model.bert import BertForPreTraining
from engine.model.layers import BertSelfAttention
from launch.forecast.kernels.counting import Kernel, Step
from launch.forecast.kernels.layer import layer_backward, layer_forward
from launch.forecast.workload import Workload, shape_of

#: operators that launch nothing: views, and memory alone
FREE = {
    "view", "_unsafe_view", "alias", "detach", "t", "slice", "select", "expand", "empty", "new_empty", "empty_like",
    "empty_strided", "new_empty_strided", "unbind",
}  # fmt: skip
SEQUENCES, LENGTH = 8, 128


class Launches(TorchDispatchMode):
    """Counts operators on tensors that stand for a GPU's, and our kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        tensors = (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
        if name not in FREE and any(tensor.device.type == "meta" for tensor in tensors):
            self.found[name] += 1
        return result

    def launch(self, kernel: str, *_: Any) -> None:
        """In the place of `nvrtc.launch`."""
        self.found[kernel.partition("<")[0]] += 1


class NoAttention(torch.autograd.Function):
    """Launches nothing in either direction."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def no_attention(self: BertSelfAttention, hidden: Tensor, _: object, asking: Tensor, *__: object) -> Tensor:
    context: Tensor = NoAttention.apply(self.query(asking), self.key(hidden), self.value(hidden))
    return context


def of_model(layers: int, mode: Launches) -> tuple[Counter[str], Counter[str]]:
    """Launches of a forward and of a backward pass of BERT-base with so many layers."""
    with torch.device("meta"):
        model = BertForPreTraining(BertConfig(num_hidden_layers=layers)).train().to(torch.bfloat16)
        model.cls.predictions.decoder.weight = model.bert.embeddings.word_embeddings.weight
        ids = torch.zeros(SEQUENCES * LENGTH, dtype=torch.long)
        masked, lengths = torch.zeros(100, dtype=torch.long), torch.zeros(SEQUENCES, dtype=torch.long)
    with mode:
        output = model(ids, ids, ids, lengths, masked, masked, lengths, max_length=LENGTH)
        loss = output["mlm_loss_sum"] + output["nsp_loss_sum"]
        ahead, mode.found = mode.found, Counter()
        loss.backward()
        back, mode.found = mode.found, Counter()
    return ahead, back


def counted(found: list[Kernel]) -> float:
    return sum(kernel.launches for kernel in found)


def test_a_layer_launches_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Launches()
    monkeypatch.setitem(dispatch.BACK_ENDS, "meta", lambda _, family: cuda if family in FAMILIES else None)
    monkeypatch.setattr(BertSelfAttention, "forward", no_attention)
    object.__setattr__(host_side._kernels, "launch", mode.launch)
    try:
        small, large = of_model(1, mode), of_model(3, mode)
    finally:
        object.__setattr__(host_side._kernels, "launch", host_side.nvrtc.launch)
    ahead, back = ({name: (b[name] - a[name]) / 2 for name in b} for a, b in zip(small, large, strict=True))
    step = Step(Workload(shape_of(ModelConfig(size="base"), 30522), LENGTH, SEQUENCES, 2, 1, 1, "bf16"))
    attention = (1, 3)
    assert sum(ahead.values()) == counted(layer_forward(step, SEQUENCES * LENGTH)) - attention[0], ahead
    assert sum(back.values()) == counted(layer_backward(step, SEQUENCES * LENGTH)) - attention[1], back
    assert (ahead["addmm"] + ahead["mm"], back["mm"]) == (6, 12)
    assert (ahead["layer_norm"], back["layer_norm_backward"]) == (2, 2), "our kernels, not torch's operators"
    assert (back["sum_partials"], back["_to_copy"]) == (6 + 2, 0), "gradients of biases and norms, each in one type"
    assert (sum(ahead.values()) + attention[0], sum(back.values()) + attention[1]) == (10, 35), "docs/roofline.md"
