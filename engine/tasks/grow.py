"""A model that starts from a folder whose embeddings lack tokens of the data: what is said about it."""

from __future__ import annotations

from engine.data.tokenizer.vocabulary import Vocabulary
from engine.hub import local_folder
from engine.model.pretrained import load_config

SHOWN = 5


def growth_lines(folder: str | None, vocabulary: Vocabulary) -> list[str]:
    """Which tokens get rows of their own, and which rows no token has: a line, or none where all match."""
    if folder is None:
        return []
    rows, tokens = load_config(local_folder(folder)).vocab_size, vocabulary.vocab_size
    line = growth(folder, rows, vocabulary.tokens[rows:], tokens)
    return [line] if line else []


def growth(folder: str, rows: int, new: list[str], tokens: int) -> str:
    """The line about a model of `rows` word embeddings that gets `new` tokens; empty where all match."""
    if new:
        shown = " ".join(new[:SHOWN]) + (" ..." if len(new) > SHOWN else "")
        plural = "s" if len(new) > 1 else ""
        return f"model.init_from {folder}: {len(new)} new row{plural} of word embeddings, from the seed, for {shown}"
    if rows > tokens:
        return f"model.init_from {folder}: {rows - tokens} of its {rows} rows of word embeddings belong to no token"
    return ""
