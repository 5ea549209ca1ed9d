"""LoRA in products of our own computes what peft's layer does, and leaves the rest to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

from engine.model.adapters.lora import ADAPTER, LoraLinear, _LoraLinear, take_over
from engine.model.layers import BertLinear


def adapted(bias: bool = True, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(BertLinear(24, 40, bias=bias)).requires_grad_(False)
    config = peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6, init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, model)
    return model


def passed(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of what is trained."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_peft_computes(dtype: torch.dtype, bias: bool) -> None:
    model = adapted(bias).to(dtype)
    x = torch.randn(17, 24, dtype=dtype)
    expected = passed(model, x)
    take_over(model)
    assert type(model[0]) is LoraLinear
    assert model[0]._is_simple(x)
    for ours, theirs in zip(passed(model, x), expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_gradients_are_those_of_differences() -> None:
    model = adapted().double()
    base, down, up = model[0].base_layer, model[0].lora_A[ADAPTER].weight, model[0].lora_B[ADAPTER].weight
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    check: Callable[..., Tensor] = lambda *given: _LoraLinear.apply(given[0], base.weight, base.bias, *given[1:], 1.5)  # noqa: E731
    assert torch.autograd.gradcheck(check, (x, down, up))


def test_what_is_not_simple_is_peft_s() -> None:
    model = adapted(lora_dropout=0.5)
    take_over(model)
    x = torch.randn(6, 24)
    assert not model[0]._is_simple(x)
    assert model.eval()[0]._is_simple(x)
    assert not model[0]._is_simple(torch.randn(2, 3, 24))
    assert model(torch.randn(2, 3, 24)).shape == (2, 3, 40)
    before = model(x)
    model[0].merge()
    assert not model[0]._is_simple(x)
    torch.testing.assert_close(model(x), before)
    partitioned = adapted()
    take_over(partitioned)
    partitioned[0].base_layer.weight.ds_id = 0  # as ZeRO-3 marks it
    assert not partitioned[0]._is_simple(x)
    dora = adapted(use_dora=True)
    take_over(dora)
    assert type(dora[0]) is lora.Linear
