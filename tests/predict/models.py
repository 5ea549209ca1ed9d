"""Tiny models with random heads, written by transformers, and texts of all lengths."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.data.tokenizer.wordpiece import train_wordpiece

SENTENCE = "the quick brown fox jumps over a lazy dog in London while Ada Lovelace writes code about naïve cafés"
WORDS = SENTENCE.split()
POSITIONS = 40
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def write_tokenizer(folder: Path) -> None:
    """A vocabulary of these words that transformers opens too."""
    train_wordpiece([SENTENCE] * 3, folder, 120, lowercase=True)


def write_model(folder: Path, head: str, labels: tuple[str, ...], **more: Any) -> Path:
    """A folder as `save_pretrained` leaves it; its weights are wide, so that predictions differ."""
    write_tokenizer(folder)
    vocabulary = len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    config = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=POSITIONS, initializer_range=0.4, id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)}, **more,
    )  # fmt: skip
    torch.manual_seed(7)
    getattr(transformers, f"BertFor{head}")(config).save_pretrained(folder)
    return folder


def change_config(folder: Path, values: Mapping[str, object]) -> None:
    """Write further fields into a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def some_texts(count: int, longest: int = 25, seed: int = 3) -> list[str]:
    """Texts of 0 to `longest` words; the first ones are odd."""
    odd = ["", " ", "fox", "The [MASK] fox, LONDON-based!", "unknown ☃ 漢字 words", "tab\tand\nline", "fox " * 300]
    drawn = random.Random(seed)
    return [*odd, *(" ".join(drawn.choices(WORDS, k=drawn.randint(1, longest))) for _ in range(count - len(odd)))]


def write_rows(path: Path, texts: list[str], **more: list[Any]) -> Path:
    """JSON lines with an id, the text and further columns."""
    columns = {"id": list(range(len(texts))), "text": texts, **more}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
