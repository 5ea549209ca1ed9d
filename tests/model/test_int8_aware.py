"""Layers that compute with rounded numbers: what they round to, their gradients, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine.config import AdapterConfig, RunConfig, TrainConfig
from engine.errors import UserError
from engine.model.int8_aware import Int8AwareLinear, round_layers, rounded_inputs, rounded_weights
from engine.model.packing import pack
from tests.model.test_task_heads import CONFIGS, LENGTHS, both, padded


def test_weights_are_64ths_of_the_largest_of_their_row() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 6)[:, None]
    weight[2] = 0.0
    weight.requires_grad_()
    found = rounded_weights(weight)
    scale = weight.detach().abs().amax(1, keepdim=True) / 64
    steps = torch.where(scale > 0, found.detach() / scale, 0.0)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert (steps.abs().amax(1)[[0, 1, 3, 4, 5]] == 64).all()
    assert ((found - weight).abs() <= 0.5001 * scale).all()
    found.backward(torch.arange(240.0).view(6, 40))
    assert torch.equal(weight.grad, torch.arange(240.0).view(6, 40))  # type: ignore[arg-type]


def test_inputs_are_steps_of_their_row_and_zero_stays() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    x[1] = x[1].abs()
    x[3] = 0.0
    x[:, 7] = 0.0
    x.requires_grad_()
    found = rounded_inputs(x)
    assert (found[:, 7] == 0).all()
    low, high = x.detach().amin(1).clamp(max=0), x.detach().amax(1).clamp(min=0)
    assert ((found - x).abs() <= (0.51 * (high - low) / 255)[:, None]).all()
    assert max(len(row.unique()) for row in found.detach()) <= 256
    assert torch.equal(found[:2].detach(), rounded_inputs(x[:2]).detach()), "a row doesn't depend on others"
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_encoder_computes_nearly_the_same_and_keeps_its_parameters(name: str) -> None:
    _, model = both(name, "sequence_classification")
    ids, mask = padded(model.config)
    batch = pack(ids, mask)
    before = dict(model.state_dict())
    with torch.no_grad():
        exact = model.eval()(**batch, max_length=max(LENGTHS))
        round_layers(model)
        found = model(**batch, max_length=max(LENGTHS))
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.2
    assert list(model.state_dict()) == list(before)
    assert all(values is before[key] or torch.equal(values, before[key]) for key, values in model.state_dict().items())
    linears = [each for each in model.modules() if isinstance(each, nn.Linear)]
    aware = [each for each in linears if isinstance(each, Int8AwareLinear)]
    assert 0 < len(aware) < len(linears)
    model.train()(**batch, max_length=max(LENGTHS)).square().sum().backward()
    assert all(each.weight.grad is not None and bool(each.weight.grad.any()) for each in aware)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.int8_aware: True is not allowed; the model has no layers"):
        round_layers(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("task", "adapter", "message"),
    [
        ("pretrain", "none", "task pretrain is no task on labelled data; leave it out"),
        ("sequence_classification", "lora", "adapter.method lora keeps the weights that would be rounded as they are"),
    ],
)
def test_only_fine_tuning_of_all_weights_takes_it(task: str, adapter: Any, message: str) -> None:
    config = RunConfig(task=task, adapter=AdapterConfig(method=adapter), train=TrainConfig(int8_aware=True))
    with pytest.raises(UserError, match=f"train.int8_aware: True is not allowed; {message}"):
        config.validate(complete=False)
