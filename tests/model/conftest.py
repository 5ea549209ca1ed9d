"""A tiny model and a ragged batch, padded as transformers takes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

LENGTHS = (11, 3, 7, 1, 11)


@pytest.fixture
def config() -> BertConfig:
    return BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.3,
    )


@pytest.fixture
def padded() -> dict[str, Tensor]:
    """input_ids, attention_mask and token_type_ids [5, 11] of sequences of different lengths."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, 97, mask.shape, generator=generator) * mask
    segments = torch.randint(0, 2, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
