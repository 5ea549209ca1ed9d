"""Tiny models of each architecture with weights that are wide enough to matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config import ARCHITECTURES

KINDS = ("bert", "roberta", "modernbert")
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def config_of(kind: str, **more: Any) -> Any:
    """Of 3 layers with 4 heads and 48 neurons each; ModernBERT's second layer sees windows."""
    own: dict[str, Any] = {"pad_token_id": 1}
    if kind == "modernbert":
        own |= {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "local_attention": 8}
        own |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    return ARCHITECTURES.get(kind).config_class()(**{**SIZES, **own, **more})


def widened(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with drawn weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()
