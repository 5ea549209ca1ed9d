"""A tiny BERT in a real Hugging Face folder, for the tests of tasks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from engine.data.tokenizer.wordpiece import load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "was"]
POSITIONS = 16
TINY = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=POSITIONS,
)


def save_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    load_tokenizer(folder / "vocab.txt").save(folder)


def tiny_bert(folder: Path) -> Path:
    """A folder with its weights, the same in every call, and its tokenizer."""
    torch.manual_seed(0)
    BertModel(TINY).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
