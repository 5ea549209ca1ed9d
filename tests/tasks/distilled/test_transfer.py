"""Texts without labels: they are taught, and neither the loss against labels nor its curves know of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import DistilConfig, RegulariseConfig
from engine.data.labelled.transfer import TransferSource
from engine.data.loading.source import Cursor, MicroBatch
from engine.errors import UserError
from engine.tasks.finetune import FineTuning
from engine.tasks.sequence import OnTexts
from tests.tasks.distilled.plain import make_taught, wide
from tests.tasks.regularised.plain import make

TEXTS = ["a good film", "the bad", "a film the film was good", "was"]


def make_transferred(folder: Path, name: str, **distil: float) -> FineTuning:
    make_taught(folder, name)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"sentence": text}) + "\n" for text in TEXTS))
    options = DistilConfig(teachers=str(folder / "teacher-0"), texts=str(folder / "texts.jsonl"), **distil)
    return make(folder, name, RegulariseConfig(), distil=options)


def batch_of(source: TransferSource, examples: list[int]) -> MicroBatch:
    """Examples by their number in the file, as a global batch."""
    places = np.argsort(source.describe(0, np.arange(source.count)))[examples]
    return MicroBatch(source.collate(np.array(examples)), source.totals(0, places), Cursor(), max_length=14)


@pytest.mark.parametrize("name", ["sequence_classification", "regression", "multi_label_classification"])
def test_texts_without_labels_are_learned_from_teachers_alone(tmp_path: Path, name: str) -> None:
    task = make_transferred(tmp_path, name)
    source, known = task.train_source(), task.sources["train"].count
    assert isinstance(source, TransferSource)
    assert source.epoch_size(0) == known + len(TEXTS)
    model, labelled, texts = wide(task), [0, 1, 2], [known, known + 2]
    both, own = (task.step(model, batch_of(source, chosen)) for chosen in (labelled + texts, labelled))
    alone = task.step(model, batch_of(source, texts))
    assert float(both.metrics["hard_loss"]) == pytest.approx(float(own.metrics["hard_loss"]), rel=1e-5)
    mixed = (3 * float(own.metrics["soft_loss"]) + 2 * float(alone.metrics["soft_loss"])) / 5
    assert float(both.metrics["soft_loss"]) == pytest.approx(mixed, rel=1e-4)
    assert float(alone.metrics["hard_loss"]) == 0.0
    assert float(alone.loss) == pytest.approx(float(alone.metrics["soft_loss"]), rel=1e-5)
    alone.loss.backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)


def test_they_are_part_of_the_runs_identity_and_of_what_is_told(tmp_path: Path) -> None:
    task = make_transferred(tmp_path, "sequence_classification")
    before = {fact.name: fact.value for fact in task.facts()}
    (tmp_path / "texts.jsonl").write_text('{"sentence": "a film"}\n')
    again = type(task)(task.config)
    after = {fact.name: fact.value for fact in again.facts()}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"texts without labels"}
    limited = replace(task.config, labelled=replace(task.config.labelled, limit=3))
    fewer = {fact.name: fact.value for fact in type(task)(limited).facts()}
    assert {name for name in after if after[name] != fewer[name]} == {"training examples"}
    again.build_model()
    assert again.describe_model()[1] == f"{tmp_path}/texts.jsonl: 1 texts without labels beside the training examples"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no examples in it"),
        ('{"text": "a film"}\n', "no column 'sentence'"),
        ('{"sentence": ""}\n', "empty text in column 'sentence'"),
    ],
)
def test_a_file_of_texts_that_cannot_be_read_is_told_in_a_line(tmp_path: Path, content: str, said: str) -> None:
    task = make_transferred(tmp_path, "sequence_classification")
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(UserError) as caught:
        type(task)(task.config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(task, OnTexts)
