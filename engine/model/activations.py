"""The activations of BERT configurations, by transformers' names.

transformers' own table is not asked: importing it loads the better part of transformers and of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from engine.errors import UserError


def _tanh_gelu() -> nn.Module:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016)."""
    return nn.GELU(approximate="tanh")


#: what published BERTs have in `hidden_act`; several names are one function
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_python": nn.GELU,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation(name: str) -> nn.Module:
    """The activation of a configuration's `hidden_act`.

    Raises:
        UserError: a name that no BERT configuration uses.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"hidden_act: {name!r} is not supported; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()
