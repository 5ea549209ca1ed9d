"""Padded samples of a store for transformers' Trainer, the rival of `benchmarks.pretrain_step`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 128
#: masked tokens of ModernBERT's pre-training
MODERNBERT_RATE = 0.3
#: most samples, and pieces of them, that a file holds
SAMPLES = 2048


def make_samples(
    store: Path, count: int, path: Path, split: str = "train", seed: int = 1, length: int = LENGTH
) -> tuple[float, float]:
    """Write padded samples of a split of a store for the rival, the first `count` at most; mean tokens and masked
    tokens of one."""
    from engine.config import DataConfig, RunConfig
    from engine.tasks.pretrain import Pretraining

    data = DataConfig(path=str(store), sequence_length=length, short_sequence_probability=0.0)
    task = Pretraining(RunConfig(data=data, seed=seed))
    source = task.train_source() if split == "train" else task.evaluation_source(split)
    assert source is not None, "no text was held out"
    count = min(count, source.epoch_size(0))
    inputs = source.collate(source.describe(0, np.arange(count)))
    arrays = padded(inputs, length)
    np.savez(path, **arrays, next_sentence_label=inputs["nsp_labels"].numpy())
    return float(inputs["lengths"].numpy().mean()), len(inputs["mlm_positions"]) / count


def padded(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Packed sequences as int32 arrays [sequences, length]: input_ids, token_type_ids, attention_mask, labels."""
    ids = inputs["input_ids"].numpy()
    filled = np.arange(length) < inputs["lengths"].numpy()[:, None]
    labels = np.full(len(ids), -100, np.int32)
    labels[inputs["mlm_positions"].numpy()] = inputs["mlm_labels"].numpy()
    packed = {"input_ids": ids, "token_type_ids": inputs["token_type_ids"].numpy(), "attention_mask": 1}
    arrays = {name: np.zeros(filled.shape, np.int32) for name in packed}
    for name, values in packed.items():
        arrays[name][filled] = values
    arrays["labels"] = np.full(filled.shape, -100, np.int32)
    arrays["labels"][filled] = labels
    return arrays


def make_pieces(store: Path, path: Path, length: int) -> list[int]:
    """Write the pieces of documents that samples of MLM alone are made of for the rival, padded; tokens of each."""
    from engine.config import DataConfig, RunConfig
    from engine.tasks.pretrain import Pretraining

    data = DataConfig(path=str(store), sequence_length=length, objective="mlm", mask_probability=MODERNBERT_RATE)
    config = RunConfig(data=data, seed=1)
    config.model.max_positions = max(512, length)
    source = Pretraining(config).train_source()
    count = min(SAMPLES, SAMPLES * LENGTH * 8 // length, source.epoch_size(0))
    inputs = source.collate(source.describe(0, np.arange(count)))
    arrays = {name: rows[:SAMPLES] for name, rows in padded(inputs, length).items() if name != "token_type_ids"}
    np.savez(path, **arrays)
    lengths: list[int] = inputs["lengths"][:SAMPLES].tolist()
    return lengths
