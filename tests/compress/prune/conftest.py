"""A tiny trained model and its labelled files, made once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.predict.models import WORDS, write_model, write_rows


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a classifier of two classes, beside train.jsonl and dev.jsonl."""
    folder = tmp_path_factory.mktemp("classifier")
    drawn = random.Random(3)
    for name, count in (("train", 48), ("dev", 24)):
        texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(2, 20))) for _ in range(count)]
        write_rows(folder / f"{name}.jsonl", texts, label=[drawn.choice("ab") for _ in texts])
    return write_model(folder / "model", "SequenceClassification", ("a", "b"))
