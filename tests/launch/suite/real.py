"""A suite of tiny models that are really trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from transformers import BertConfig, BertModel

from engine.data.tokenizer.wordpiece import load_tokenizer
from tests.train.test_best import sentences, write


def write_bert(folder: Path, store: Path) -> Path:
    """A model of one layer, 32 wide, with the store's vocabulary."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vocabulary = load_tokenizer(store / "tokenizer").vocab_size
    BertModel(BertConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    shutil.copytree(store / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def write_real_suite(folder: Path, store: Path, *, tasks: int, steps: int) -> Path:
    """Sentences in which one word tells the class, or a number; two learning rates and two seeds."""
    write_bert(folder / "bert", store)
    rows = sentences(31, 29)
    files = {}
    for name, some in {"train": rows, "validation": rows[::3], "test": rows[::2]}.items():
        files[name] = write(folder / f"{name}.jsonl", some).name
        numbers = [json.dumps({"sentence": text, "label": float(kind == "tool")}) for text, kind in some]
        (folder / f"numbers_{name}.jsonl").write_text("\n".join(numbers) + "\n")
    suite = {
        "models": {"tiny": "bert"},
        "base": {
            "labelled.max_length": 16,
            "train": {"steps": steps, "global_batch": 16, "verify_update": 0, "save_interval": 20, "log_interval": 5},
            "monitor.tensorboard": False,
        },
        "tasks": {
            "kinds": {"task": "sequence_classification", "labelled": files},
            "numbers": {
                "task": "regression",
                "labelled": {name: f"numbers_{file}" for name, file in files.items()},
            },
        },
        "grid": {"optim.learning_rate": [1e-2, 1e-7]},
        "seeds": 2,
    }
    suite["tasks"] = dict(list(suite["tasks"].items())[:tasks])  # type: ignore[attr-defined]
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path
