"""Each trained parameter's learning rate: by its layer, and by its factor of LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import AdapterConfig, OptimConfig
from engine.model.adapters.adapt import Adaptation
from engine.optim.build import build_optimizer
from tests.model.adapters.adapted import fresh_head
from tests.model.test_task_heads import both

DECAY, RATIO = 0.5, 16.0
#: by the beginning of a name, how many times the rate is multiplied by the decay in a model of three layers
BELOW = {
    "bert": {
        "bert.embeddings.": 4, "bert.encoder.layer.0.": 3, "bert.encoder.layer.1.": 2, "bert.encoder.layer.2.": 1,
        "bert.pooler.": 0, "classifier.": 0,
    },
    "modernbert": {
        "model.embeddings.": 4, "model.layers.0.": 3, "model.layers.1.": 2, "model.layers.2.": 1,
        "model.final_norm.": 0, "head.": 0, "classifier.": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"method": "lora"}, {"method": "dora"}, {"method": "houlsby"}])
@pytest.mark.parametrize("name", BELOW)
def test_rates_fall_by_layer_and_b_has_its_own(name: str, options: dict[str, Any]) -> None:
    _, model = both(name, "sequence_classification")
    Adaptation(AdapterConfig(**options), None, 1, 10, "base").apply(model, fresh_head(model))
    ratio = RATIO if options.get("method") in ("lora", "dora") else 1.0
    optimizer = build_optimizer(model, OptimConfig(layer_decay=DECAY, lora_ratio=ratio), torch.device("cpu"))
    rates = {id(p): group["rate_multiplier"] for group in optimizer.param_groups for p in group["params"]}
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(rates) == len(trained)
    for key, parameter in trained.items():
        (below,) = (times for start, times in BELOW[name].items() if key.startswith(start))
        assert rates[id(parameter)] == DECAY**below * (ratio if "lora_B" in key else 1.0), key
    assert ratio == 1.0 or any("lora_B" in key for key in trained)
