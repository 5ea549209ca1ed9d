"""Pairs and triples of a few words, the task on them, and a rank that computes the gradient of a global batch.

python -m torch.distributed.run --nproc_per_node=N -m tests.tasks.embeddings.worlds FOLDER MICRO_BATCH OPTIONS
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from engine import dist
from engine.config import LabelledConfig, ModelConfig, RunConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.tasks.embeddings.task import Embeddings
from engine.train.ranks.join import end_ranks, start_ranks
from tests.tasks.tiny import TINY, WORDS, save_tokenizer

Row = dict[str, Any]

GLOBAL_BATCH = 16
COLUMNS = {"text": "text", "text_pair": "positive", "max_length": 14}


def triples(count: int, seed: int) -> list[Row]:
    """A text, its words in another order, and none to two texts of other words."""
    generator, rows = np.random.default_rng(seed), []
    for _ in range(count):
        words = generator.choice(WORDS[5:], size=generator.integers(3, 9)).tolist()
        text, positive = " ".join(words), " ".join(generator.permutation(words))
        others = [" ".join(generator.choice(WORDS[5:], size=5)) for _ in range(generator.integers(0, 3))]
        negatives = [other for other in others if other not in (text, positive)]
        rows.append({"text": text, "positive": positive, "negatives": negatives})
    return rows


def graded(count: int, seed: int) -> list[Row]:
    """Pairs with the share of words that both have."""
    generator, rows = np.random.default_rng(seed), []
    for _ in range(count):
        one, other = (generator.choice(WORDS[5:], size=3).tolist() for _ in range(2))
        rows.append({"text": " ".join(one), "positive": " ".join(other), "label": len({*one} & {*other}) / 3})
    return rows


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def inputs(folder: Path) -> Path:
    """A tiny model and files of all kinds; narrow weights would make all vectors alike."""
    torch.manual_seed(0)
    BertModel(BertConfig(**{**TINY.to_dict(), "initializer_range": 0.1})).save_pretrained(folder / "bert")
    save_tokenizer(folder / "bert")
    for number, (name, rows) in enumerate({"train": triples, "pairs": triples, "graded": graded}.items()):
        write(folder / f"{name}.jsonl", rows(90 if name == "train" else 40, number))
    return folder


def make_task(folder: Path, dropout: float = 0.0, **changes: Any) -> Embeddings:
    """The task on the files of `inputs`."""
    files = {"train": str(folder / "train.jsonl"), "validation": str(folder / "pairs.jsonl")}
    labelled = LabelledConfig(**{**COLUMNS, **files, "negatives": "negatives", **changes})
    model = ModelConfig(init_from=str(folder / "bert"), hidden_dropout=dropout, attention_dropout=dropout)
    config = RunConfig(task="embeddings", model=model, labelled=labelled)
    config.validate()
    config.monitor.tensorboard = False
    return Embeddings(config)


def global_step(task: Embeddings, model: nn.Module, layout: BatchLayout) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient of the first global batch and its curves, as the loop computes them, summed over ranks."""
    batches = islice(training_batches(task.train_source(), layout, Cursor(), workers=0), layout.accumulation)
    curves: dict[str, Tensor] = {}
    for batch in task.ahead(model, batches):
        output = task.step(model, batch)
        output.loss.backward()
        for name, share in {"loss": output.loss.detach(), **output.metrics}.items():
            curves[name] = curves.get(name, torch.zeros(())) + share
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: dist.sum_over_ranks(gradient) for name, gradient in trained.items()}
    return gradients, {name: float(dist.sum_over_ranks(value)) for name, value in curves.items()}


def main(folder: Path, micro_batch: int, options: dict[str, Any]) -> None:
    world = start_ranks()
    task = make_task(folder, **options)
    layout = BatchLayout(GLOBAL_BATCH, micro_batch, world.rank, world.size)
    gradients, curves = global_step(task, task.build_model().train(), layout)
    if world.is_main:
        save_file(gradients, folder / "gradients.safetensors")
        (folder / "curves.json").write_text(json.dumps(curves))
    end_ranks(world)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other ranks wait in a collective, for which an ordinary exit would wait too
