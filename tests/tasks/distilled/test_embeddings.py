"""Distillation of embeddings: vectors are compared by cosine, micro-batch by micro-batch as in one."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from engine.config import DistilConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.errors import UserError
from engine.model.folder import TOKENIZER_FILES
from engine.tasks.embeddings.task import Embeddings
from tests.tasks.embeddings.worlds import inputs, make_task


def taught(folder: Path, distil: dict[str, float], **sizes: int) -> Embeddings:
    """A task whose teacher is an encoder of the same tokenizer with weights of its own."""
    plain, teacher = make_task(inputs(folder)), folder / "teacher"
    torch.manual_seed(1)
    BertModel(BertConfig.from_dict({**plain.model_config.to_dict(), **sizes})).save_pretrained(teacher)
    for name in TOKENIZER_FILES:
        if (plain.tokenizer / name).is_file():
            (teacher / name).write_bytes((plain.tokenizer / name).read_bytes())
    return Embeddings(replace(plain.config, distil=DistilConfig(teachers=str(teacher), **distil)))  # type: ignore[arg-type]


def test_vectors_are_compared_by_cosine_on_every_layout(tmp_path: Path) -> None:
    task = taught(tmp_path, {"hidden": 1.0, "relations": 1.0, "hard": 0.5})
    model, sums = task.build_model().eval(), []
    for size in (8, 2):
        batches = islice(training_batches(task.train_source(), BatchLayout(8, size), Cursor(), 0), 8 // size)
        outputs = [task.step(model, batch) for batch in task.ahead(model, batches)]
        sums.append({name: sum(float(one.metrics[name]) for one in outputs) for name in outputs[0].metrics})
        sums[-1]["loss"] = sum(float(one.loss) for one in outputs)
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
    assert sums[0].keys() >= {"in_batch_accuracy", "soft_loss", "hidden_loss", "relation_loss"}
    batch = next(training_batches(task.train_source(), BatchLayout(8, 8), Cursor(), 0))
    (teacher, _), given = task.distillation._models[0], {name: batch.inputs[name] for name in PACKED}
    with torch.no_grad():
        cosines = functional.cosine_similarity(model(**given), teacher(**given))
    assert sums[0]["soft_loss"] == pytest.approx(1.0 - float(cosines.mean()), rel=1e-4)


PACKED = ("input_ids", "token_type_ids", "position_ids", "lengths")


def test_vectors_of_two_widths_cannot_be_compared(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 4}
    with pytest.raises(
        UserError, match=r"distil\.soft: 1\.0 is not allowed; .* gives vectors of 24 numbers and the run"
    ):
        taught(tmp_path, {}, **sizes).build_model()
