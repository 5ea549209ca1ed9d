"""A layer that an adapter wraps: what it adds comes before the activation, wherever plain layers fuse the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize
from transformers import BertConfig

from engine.kernels.dispatch import gelu_in_linear
from engine.model import layers
from engine.model.layers import BertActivatedDense, BertLinear

RANK = 2
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LowRank(nn.Module):
    """A frozen layer and a trained product of two thin matrices beside it, as LoRA (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(random(RANK, base.in_features, seed=1).to(base.weight.dtype))
        self.up = nn.Parameter(random(base.out_features, RANK, seed=2).to(base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        return result + x @ self.down.t() @ self.up.t()


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def block(config: BertConfig, request: pytest.FixtureRequest) -> BertActivatedDense:
    block = BertActivatedDense(config, config.intermediate_size)
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return block.to(request.param)


def test_a_wrapped_layer_is_activated_after_the_wrappers_part(block: BertActivatedDense) -> None:
    base, dtype = block.dense, block.dense.weight.dtype
    adapter = LowRank(base)
    block.dense = adapter  # type: ignore[assignment]
    x = random(7, base.in_features, seed=3).to(dtype).requires_grad_()
    right_x, down, up = (tensor.detach().clone().requires_grad_() for tensor in (x, adapter.down, adapter.up))
    right = F.gelu(base(right_x) + right_x @ down.t() @ up.t())
    result, grad = block(x), random(7, base.out_features, seed=4).to(dtype)
    result.backward(grad)
    right.backward(grad)
    torch.testing.assert_close(result, right, rtol=0.0, atol=0.0)
    for ours, plain in ((x, right_x), (adapter.down, down), (adapter.up, up)):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=0.0, atol=0.0)
    assert base.weight.grad is None


def add_hook(layer: BertLinear) -> None:
    layer.register_forward_hook(lambda _module, _inputs, output: output + 1.0)


def replace_forward(layer: BertLinear) -> None:
    plain = layer.forward
    layer.forward = lambda x, **options: plain(x, **options) + 1.0  # type: ignore[method-assign]


class PlusOne(nn.Module):
    def forward(self, bias: Tensor) -> Tensor:
        return bias + 1.0


def parametrise(layer: BertLinear) -> None:
    parametrize.register_parametrization(layer, "bias", PlusOne())


@pytest.mark.parametrize("change", [add_hook, replace_forward, parametrise])
def test_what_is_added_without_a_wrapper_is_activated_too(
    change: Callable[[BertLinear], None], block: BertActivatedDense
) -> None:
    x = random(7, block.dense.in_features, seed=3).to(block.dense.weight.dtype)
    plain = nn.functional.linear(x, block.dense.weight, block.dense.bias)
    change(block.dense)
    torch.testing.assert_close(block(x), F.gelu(plain + 1.0), rtol=2e-2, atol=2e-2)


def test_the_gradient_that_a_backward_hook_sees_is_that_of_the_linear_layers_result(block: BertActivatedDense) -> None:
    seen: list[Any] = []
    block.dense.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0].clone()))
    x = random(7, block.dense.in_features, seed=3).to(block.dense.weight.dtype)
    block(x).sum().backward()
    plain = F.linear(x, block.dense.weight, block.dense.bias).detach().requires_grad_()
    F.gelu(plain).sum().backward()
    torch.testing.assert_close(seen[0], plain.grad, rtol=2e-2, atol=2e-2)


def test_a_plain_layer_is_fused_and_keeps_its_names(block: BertActivatedDense) -> None:
    assert list(block.state_dict()) == ["dense.weight", "dense.bias"]
    x = random(7, block.dense.in_features, seed=3).to(block.dense.weight.dtype)
    with mock.patch.object(layers, "linear_gelu", wraps=layers.linear_gelu) as fused:
        result = block(x)
    assert fused.call_count == 1
    assert torch.equal(result, layers.linear_gelu(x, block.dense.weight, block.dense.bias))


def test_hooks_of_zero_3_leave_a_layer_fused(block: BertActivatedDense) -> None:
    """They gather and release its weights, and change no result."""

    def release(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output

    release.__module__ = "deepspeed.runtime.zero.parameter_offload"
    block.dense.register_forward_hook(release)
    assert gelu_in_linear(block.dense, block.activation, BertLinear)
