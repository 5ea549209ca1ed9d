"""A tiny BERT in a real Hugging Face folder, for the tests of tasks, and how they train and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from engine.data.loading.loader import BatchLayout, evaluation_batches, training_batches
from engine.data.loading.source import Cursor
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.tasks.task import Evaluation, Task

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


def tiny_teacher(folder: Path, names: Sequence[str]) -> Path:
    """A classifier of the same tokenizer, wider and deeper, whose predictions are no guesses."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig.from_dict({**TINY.to_dict(), **sizes, "id2label": dict(enumerate(names))})
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(100.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def evaluate(task: Task, model: nn.Module, micro_batch: int = 8, split: str = "validation") -> Evaluation:
    """Of the examples of a split."""
    source = task.evaluation_source(split)
    assert source is not None
    return task.evaluate(model, evaluation_batches(source, 0, 1, micro_batch, 0))


def train(task: Task, model: nn.Module, steps: int, rate: float = 5e-3, batch: int = 16) -> list[float]:
    """Steps of AdamW; the loss of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    batches = training_batches(task.train_source(), BatchLayout(batch, batch), Cursor(), workers=0)
    losses = []
    for _, given in zip(range(steps), batches, strict=False):
        output = task.step(model, given)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return losses
