"""The score of a module on a task's examples, and the difference of two."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from engine.compress.score import change, check_classes, score
from engine.errors import UserError
from engine.tasks.outcomes import score_of
from tests.tasks.labels import maker
from tests.tasks.tiny import evaluate


@pytest.mark.parametrize("name", ["sequence_classification", "regression", "multi_label_classification"])
def test_a_score_is_that_of_the_evaluation(tmp_path: Path, name: str) -> None:
    task = maker(tmp_path)(name)
    model = task.build_model()
    found = score(task, model)
    assert found.metric == task.best_metric
    assert found.value == pytest.approx(evaluate(task, model).scalars[found.metric], abs=1e-6)
    low, high = found.interval
    assert low <= found.value <= high
    assert (change(found, found).value, change(found, found).p) == (0.0, 1.0)


def test_a_metric_of_errors_gives_way_to_one_of_which_more_is_better(tmp_path: Path) -> None:
    task = maker(tmp_path)("regression", metric="mse")
    assert score(task, task.build_model()).metric == "pearson"


def test_the_difference_is_of_the_same_examples(tmp_path: Path) -> None:
    task = maker(tmp_path)("sequence_classification")
    model = task.build_model()
    before = score(task, model)
    nn.init.normal_(model.classifier.weight, std=5.0)
    after = score(task, model)
    found, shares = change(before, after), [each.outcomes.scores["accuracy"] for each in (before, after)]
    assert found.value == pytest.approx(after.value - before.value) == np.mean(shares[1] - shares[0])
    assert score_of("accuracy", shares[1]) == after.value
    assert found.low < found.value < found.high


def test_classes_must_be_the_models() -> None:
    config = SimpleNamespace(num_labels=2, id2label={0: "no", 1: "yes"})
    check_classes(("no", "yes"), config)
    check_classes(None, config)
    check_classes(("no", "yes"), SimpleNamespace(num_labels=2, id2label={0: "LABEL_0", 1: "LABEL_1"}))
    for names in (("yes", "no"), ("no", "perhaps", "yes")):
        with pytest.raises(UserError, match=r"data: its classes are .* and the model's no, yes; give examples of all"):
            check_classes(names, config)
