"""R-Drop: loss and gradient of every task are those of two passes of transformers' model under equal masks."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from engine.config import RegulariseConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.errors import UserError
from tests.tasks.regularised.plain import (
    TASKS_OF_LOGITS,
    global_batch,
    make,
    same_gradients,
    their_divergence,
    their_logits,
    their_loss,
    theirs_of,
    wide,
)

WEIGHT = 3.0
BOUND = 1e-5


@pytest.mark.parametrize("name", TASKS_OF_LOGITS)
def test_loss_and_gradient_are_those_of_two_passes_of_transformers(tmp_path: Path, name: str) -> None:
    task = make(tmp_path, name, RegulariseConfig(r_drop=WEIGHT))
    model, batch = wide(task), global_batch(task)
    words = model.get_submodule("bert.embeddings.word_embeddings")
    tokens, width = len(batch.inputs["input_ids"]), task.model_config.hidden_size
    masks = torch.rand((2, tokens, width), generator=torch.Generator().manual_seed(1)).gt(0.3) / 0.7
    words.register_forward_hook(lambda _, __, output: output * masks.flatten(0, 1))
    output = task.step(model, batch)
    output.loss.backward()

    theirs, lengths = theirs_of(task, model), batch.inputs["lengths"].tolist()
    split = [mask.split(lengths) for mask in masks]
    first, second = (their_logits(theirs, batch, lambda words, i, of=of: words * of[i]) for of in split)  # type: ignore[misc]
    apart = their_divergence(name, first, second, batch)
    expected = (their_loss(task, first, batch) + their_loss(task, second, batch)) / 2 + WEIGHT * apart
    expected.backward()
    assert float(apart) > 1e-4
    assert float(output.metrics["r_drop"]) == pytest.approx(float(apart), rel=1e-4)
    assert float(output.loss) == pytest.approx(float(expected), rel=BOUND)
    same_gradients(model, theirs, BOUND)


@pytest.mark.parametrize("name", TASKS_OF_LOGITS)
def test_without_dropout_it_is_the_tasks_own_loss_in_shares(tmp_path: Path, name: str) -> None:
    plain, task = make(tmp_path, name, RegulariseConfig()), make(tmp_path, name, RegulariseConfig(r_drop=WEIGHT))
    model = wide(task)
    own = plain.step(model, global_batch(plain))
    parts = islice(training_batches(task.train_source(), BatchLayout(8, 2), Cursor(), workers=0), 4)
    outputs = [task.step(model, part) for part in parts]
    assert sum(float(one.loss) for one in outputs) == pytest.approx(float(own.loss), rel=1e-5)
    assert outputs[0].metrics.keys() == own.metrics.keys() | {"r_drop"}
    for metric, share in own.metrics.items():
        assert sum(float(one.metrics[metric]) for one in outputs) == pytest.approx(float(share), rel=1e-5)
    assert sum(float(one.metrics["r_drop"]) for one in outputs) == pytest.approx(0.0, abs=1e-9)


def test_dropout_sets_the_passes_apart_and_the_operations_are_doubled(tmp_path: Path) -> None:
    name = "sequence_classification"
    plain, task = make(tmp_path, name, RegulariseConfig()), make(tmp_path, name, RegulariseConfig(r_drop=1.0))
    batch = global_batch(task)
    assert float(task.step(task.build_model().train(), batch).metrics["r_drop"]) > 1e-6
    assert task.flops(batch) == 2 * plain.flops(batch)


def test_a_model_without_dropout_is_refused(tmp_path: Path) -> None:
    task = make(tmp_path, "regression", RegulariseConfig())
    task.config.model.hidden_dropout = task.config.model.attention_dropout = 0.0
    task.config.regularise.r_drop = 1.0
    with pytest.raises(UserError) as caught:
        type(task)(task.config)
    assert str(caught.value) == (
        "regularise.r_drop: 1.0 is not allowed; the model has no dropout, so that both passes are the same; give "
        "model.hidden_dropout, such as 0.1"
    )
    task.config.model.classifier_dropout = 0.2
    type(task)(task.config)
