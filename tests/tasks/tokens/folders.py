"""A tiny BERT in a Hugging Face folder, and sentences whose words tell their tags."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

from engine.data.tokenizer.wordpiece import SPECIAL_TOKENS, load_tokenizer

FIRST = ["anna", "bert", "carl"]
PLACES = ["rome", "oslo", "new", "york"]
WORDS = ["lives", "in", "saw", "the", "smith", "##s", ",", "."]
VOCABULARY = [*SPECIAL_TOKENS, *FIRST, *PLACES, *WORDS]
POSITIONS = 40


def save_model(folder: Path) -> Path:
    """The folder of a model of this vocabulary."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=POSITIONS, **sizes)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    load_tokenizer(folder / "vocab.txt").save(folder)
    return folder


def sentences(count: int, seed: int, most: int = 4) -> list[tuple[list[str], list[str]]]:
    """Tokens and tags: of people with or without a second name, of places, and of other words."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens: list[str] = []
        tags: list[str] = []
        for _ in range(generator.integers(1, most + 1)):
            first, place = str(generator.choice(FIRST)), str(generator.choice(["rome", "oslo", "new york"]))
            person = [first, "smiths"][: generator.integers(1, 3)]
            words = [*person, "lives", "in", *place.split(), "."]
            tokens += words
            tags += ["B-PER", *["I-PER"] * (len(person) - 1), "O", "O", "B-LOC", *["I-LOC"] * place.count(" "), "O"]
        made.append((tokens, tags))
    return made


def write_conll(path: Path, count: int, seed: int, most: int = 4) -> str:
    rows = ("".join(f"{a}\t{b}\n" for a, b in zip(*each, strict=True)) for each in sentences(count, seed, most))
    path.write_text("\n".join(rows))
    return str(path)


def write_spans(path: Path, count: int, seed: int) -> str:
    """The same sentences as raw texts with spans."""
    with path.open("w") as file:
        for tokens, tags in sentences(count, seed):
            text, spans = "", []
            for token, tag in zip(tokens, tags, strict=True):
                start = len(text) + bool(text)
                text = f"{text} {token}".strip()
                if tag.startswith("B-"):
                    spans.append([start, len(text), tag[2:]])
                elif tag != "O":
                    spans[-1][1] = len(text)
            file.write(json.dumps({"text": text, "spans": spans}) + "\n")
    return str(path)
