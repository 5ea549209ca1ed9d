"""The activations are those that transformers has under the same names."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from engine.errors import UserError
from engine.model.activations import ACTIVATIONS, activation

#: half an approximation's last digits in fp32, where a formula is spelled out instead of called
ROUNDING = 1e-6


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_values_and_gradients_are_those_of_transformers(name: str) -> None:
    own = torch.linspace(-12, 12, 4001).requires_grad_()
    theirs = own.detach().clone().requires_grad_()
    result, expected = activation(name)(own), ACT2FN[name](theirs)
    torch.testing.assert_close(result, expected, rtol=ROUNDING, atol=ROUNDING)
    result.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(own.grad, theirs.grad, rtol=ROUNDING, atol=2 * ROUNDING)


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "tanh"])
def test_the_common_ones_are_equal_to_the_last_bit(name: str) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(activation(name)(values), ACT2FN[name](values))


@pytest.mark.parametrize("name", ["step", "gelu_10", "", "GELU"])
def test_another_name_is_refused_in_a_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^hidden_act: '.*' is not supported; choose one of gelu, "):
        activation(name)
