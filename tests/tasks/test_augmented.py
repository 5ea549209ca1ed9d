"""Tasks whose training examples change in every epoch, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import TASKS, LabelledConfig, ModelConfig, RunConfig
from engine.data.augment.source import AugmentedSource, AugmentedTags
from engine.errors import UserError
from engine.tasks.finetune import FineTuning
from tests.tasks.labels import ROWS, write
from tests.tasks.tiny import tiny_bert, train
from tests.tasks.tokens.folders import save_model, write_conll


def task_of(folder: Path, name: str, **labelled: Any) -> FineTuning:
    """A task on rows of its own, changed by misspellings unless the options say otherwise."""
    if name == "token_classification":
        model, path = save_model(folder / "bert"), write_conll(folder / "train.conll", 40, seed=1)
    else:
        model, path = tiny_bert(folder / "bert"), write(folder / "train.jsonl", ROWS[name](60, 1))
    given = {"augment": "characters", "max_length": 14, "max_unknown_share": 1.0, **labelled}
    config = RunConfig(
        task=name, labelled=LabelledConfig(train=path, **given), model=ModelConfig(init_from=str(model))
    )  # fmt: skip
    config.validate()
    task: FineTuning = TASKS.get(name).load()(config)
    return task


@pytest.mark.parametrize(
    "name", ["sequence_classification", "regression", "multi_label_classification", "token_classification"]
)
def test_training_examples_alone_change(tmp_path: Path, name: str) -> None:
    task = task_of(tmp_path, name)
    kinds = [type(task.sources[split]) for split in ("train", "validation")]
    assert kinds[0] in (AugmentedSource, AugmentedTags)
    assert kinds[1] not in (AugmentedSource, AugmentedTags)
    losses = train(task, task.build_model(), 6)
    assert np.isfinite(losses).all()
    (fact,) = [fact for fact in task.facts() if fact.field == "labelled.augment"]
    assert fact.value == task.augmentation.method.fingerprint  # type: ignore[union-attr]


def test_a_task_without_it_has_no_such_fact(tmp_path: Path) -> None:
    task = task_of(tmp_path, "sequence_classification", augment=None)
    assert type(task.sources["train"]) is not AugmentedSource
    assert not [fact for fact in task.facts() if fact.field == "labelled.augment"]


def test_near_words_are_those_of_the_start_model(tmp_path: Path) -> None:
    task = task_of(tmp_path, "sequence_classification", augment="eda_neighbours", augment_share=1.0)
    source = task.train_source()
    batches = [source.collate(source.describe(epoch, np.arange(20))) for epoch in (0, 0, 1)]
    ids = [batch["input_ids"].tolist() for batch in batches]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sequence_classification",
            {"augment": "mlm"},
            "'mlm' is not allowed; choose eda, eda_neighbours, char",
        ),
        ("sequence_classification", {"augment_share": 0.0}, r"augment_share: 0.0 .* give a probability in \(0, 1\]"),
        ("sequence_classification", {"augment_share": 1.2}, "augment_share: 1.2 is not allowed; give a probability"),
        (
            "sequence_classification",
            {"augment": None, "augment_share": 0.7},
            "0.7 is not allowed; it needs",
        ),
        (
            "multiple_choice",
            {},
            "augment: 'characters' is not allowed; task multiple_choice can't do",
        ),
        (
            "token_classification",
            {"label_pieces": "all"},
            "label_pieces: 'all' is not allowed; labelled.augm",
        ),
    ],
)
def test_what_can_t_be_done_is_one_line(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_of(tmp_path, name, **options)
