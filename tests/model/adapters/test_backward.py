"""The backward pass ends at the lowest trained parameter, and what is frozen below it keeps nothing for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import AdapterConfig
from engine.model.adapters.adapt import Adaptation
from engine.model.packing import pack
from tests.model.adapters.adapted import fresh_head
from tests.model.test_task_heads import both, padded

HEAD = "sequence_classification"
EMBEDDINGS = {"bert": "bert.embeddings", "modernbert": "model.embeddings"}
LAYERS = {"bert": "bert.encoder.layer.", "modernbert": "model.layers."}
#: what is trained, and the number of the lowest layer that a gradient reaches; 3 is above all
CASES: dict[str, tuple[dict[str, Any], str | None, int]] = {
    "lora": ({"method": "lora"}, None, 0),
    "lora above a layer": ({"method": "lora"}, "layers:0", 1),
    "ia3 above two": ({"method": "ia3"}, "layers:0-1", 2),
    "houlsby": ({"method": "houlsby"}, None, 0),
    "freeze": ({}, "embeddings,layers:0-1", 2),
    "head alone": ({}, "encoder", 3),
}


def kept(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, bool], int]:
    """Of modules whether their output has a gradient, and the bytes that a forward pass keeps for the backward one."""
    found: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            found[name] = any(isinstance(each, Tensor) and each.requires_grad for each in outputs)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    storages: dict[int, int] = {}
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch).sum().backward()
    for hook in hooks:
        hook.remove()
    return found, sum(storages.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_nothing_runs_below_the_lowest_trained_layer(name: str, case: str) -> None:
    options, freeze, lowest = CASES[case]
    _, model = both(name, HEAD)
    batch = pack(*padded(model.config))
    _, whole = kept(model.train(), batch)
    model.zero_grad(set_to_none=True)
    Adaptation(AdapterConfig(**options), freeze, 1, 10, "base").apply(model, fresh_head(model))
    reached, bytes_kept = kept(model, batch)
    assert not reached[EMBEDDINGS[name]]
    assert [reached[f"{LAYERS[name]}{layer}"] for layer in range(3)] == [layer >= lowest for layer in range(3)]
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    if lowest:
        assert bytes_kept < (1.05 - 0.3 * lowest) * whole
