"""Zeros are taken out of transformers' modules without a change of what they compute."""

from __future__ import annotations

import pytest
import torch

from engine.config import architecture_of
from engine.model.pruning.slim import slim
from engine.model.pruning.units import sublayers
from tests.model.pruning.tiny import KINDS, config_of, widened


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_slim_model_computes_the_same_with_fewer_weights(kind: str, attention: str) -> None:
    config = config_of(kind, attn_implementation=attention)
    architecture = architecture_of(config)
    model = widened(architecture.export_class(architecture.class_for("sequence_classification"))(config))
    removed = {0: (3, 40), 1: (4, 48), 2: (0, 0)}  # of heads and neurons, by layer
    for part in sublayers(model):
        part.zero(torch.arange(part.count) < removed[part.layer][part.kind == "neurons"])
    ids = torch.randint(4, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        slimmed = slim(model)(input_ids=ids, attention_mask=mask).logits
    assert (logits - slimmed).abs().max() <= 1e-6 * logits.abs().max()
    assert [(part.layer, part.kind, part.count) for part in sublayers(model)] == [
        (0, "heads", 1), (0, "neurons", 8), (1, "heads", 1), (1, "neurons", 1), (2, "heads", 4), (2, "neurons", 48),
    ]  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) < before


def test_a_model_without_zeros_stays_as_it_is() -> None:
    config = config_of("bert")
    model = widened(architecture_of(config).export_class("BertForMaskedLM")(config))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = slim(model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
