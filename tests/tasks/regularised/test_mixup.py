"""Mixup: losses and gradients are those of transformers' model on mixtures of pooled vectors and of labels."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.config import RegulariseConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from tests.tasks.regularised.plain import global_batch, make, same_gradients, theirs_of, wide

SPREAD = 0.8
MIXUP = RegulariseConfig(mixup=SPREAD)
BOUND = 1e-5


def mixed_loss(name: str, logits: Tensor, labels: tuple[Tensor, Tensor], share: float) -> Tensor:
    """Against mixed labels; of numbers, what the mean of both losses has more."""
    if name == "sequence_classification":
        first, second = (functional.one_hot(one, logits.shape[1]).float() for one in labels)
        return functional.cross_entropy(logits, share * first + (1 - share) * second, label_smoothing=0.1)
    first, second = (one.float() for one in labels)
    mixture = share * first + (1 - share) * second
    if name == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits, mixture)
    return functional.mse_loss(logits[:, 0], mixture) + share * (1 - share) * (first - second).square().mean()


@pytest.mark.parametrize("name", ["sequence_classification", "regression", "multi_label_classification"])
def test_loss_and_gradient_are_those_of_mixed_vectors_with_transformers(tmp_path: Path, name: str) -> None:
    task = make(tmp_path, name, MIXUP, labelled={"class_weights": None})
    model, batch = wide(task), global_batch(task)
    torch.manual_seed(5)
    output = task.step(model, batch)
    output.loss.backward()

    torch.manual_seed(5)
    share = float(torch.distributions.Beta(torch.tensor(SPREAD), torch.tensor(SPREAD)).sample())
    order = torch.randperm(8)
    assert 0.05 < share < 0.95
    theirs: Any = theirs_of(task, model)
    given = (batch.inputs[part].split(batch.inputs["lengths"].tolist()) for part in ("input_ids", "token_type_ids"))
    texts = zip(*given, strict=True)
    pooled = torch.cat([theirs.bert(ids[None], token_type_ids=kinds[None]).pooler_output for ids, kinds in texts])
    logits = theirs.classifier(share * pooled + (1 - share) * pooled[order])
    labels = batch.inputs["labels"]
    expected = mixed_loss(name, logits, (labels, labels[order]), share)
    expected.backward()
    assert float(output.loss) == pytest.approx(float(expected), rel=BOUND)
    same_gradients(model, theirs, BOUND)
    plain = make(tmp_path, name, RegulariseConfig()).step(model, batch)
    assert output.metrics == plain.metrics
    assert float(output.loss) != pytest.approx(float(plain.loss), rel=BOUND)


def test_weights_of_the_classes_sum_to_those_of_the_global_batch(tmp_path: Path) -> None:
    """Where nothing is known, each example costs the same, whoever is its partner."""
    task = make(tmp_path, "sequence_classification", MIXUP, labelled={"label_smoothing": 0.0})
    model = task.build_model().train()
    with torch.no_grad():
        for parameter in model.get_submodule("classifier").parameters():
            parameter.zero_()
    parts = islice(training_batches(task.train_source(), BatchLayout(8, 2), Cursor(), workers=0), 4)
    assert sum(float(task.step(model, part).loss) for part in parts) == pytest.approx(
        math.log(len(task.names)), rel=1e-6
    )


def test_classes_in_order_take_it_too(tmp_path: Path) -> None:
    options = {"loss": "ordinal", "label_smoothing": 0.0}
    plain, task = (make(tmp_path, "sequence_classification", o, labelled=options) for o in (RegulariseConfig(), MIXUP))
    model, batch = wide(task), global_batch(task)
    assert float(task.step(model, batch).loss) != float(plain.step(model, batch).loss)
