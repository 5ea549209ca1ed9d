"""Distillation: loss and gradient of every task are those of plain torch on transformers' models."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import architecture_of
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.model.folder import PROJECTIONS
from engine.tasks.distilled.distillation import layer_pairs
from tests.tasks.distilled.plain import (
    LARGER,
    make_taught,
    their_hidden,
    their_passes,
    their_relations,
    their_soft,
    wide,
)
from tests.tasks.regularised.plain import TASKS_OF_LOGITS, global_batch, same_gradients, their_loss, theirs_of

BOUND = 1e-5
WEIGHTS = {"hard": 0.5, "soft": 2.0, "hidden": 0.3, "relations": 0.7}


@pytest.mark.parametrize("name", TASKS_OF_LOGITS)
def test_loss_and_gradient_are_those_of_plain_torch_on_transformers_models(tmp_path: Path, name: str) -> None:
    """Of two teachers, one of which is wider and deeper; with states of all tokens, whatever the head reads."""
    task = make_taught(tmp_path, name, ({}, LARGER), **WEIGHTS, temperature=3.0, relation_heads=4, relation_layer=0)
    model, batch = wide(task), global_batch(task)
    output = task.step(model, batch)
    output.loss.backward()

    theirs = theirs_of(task, model)
    logits, hidden, projected = their_passes(theirs, batch)
    lessons = []
    for teacher in task.distillation:
        kind = architecture_of(teacher.config).export_class(task.export_class(teacher.config))
        with torch.no_grad():
            lessons.append(their_passes(kind.from_pretrained(teacher.folder).eval(), batch))
    projections = [None, model.get_submodule(f"{PROJECTIONS}.0")]
    told = torch.stack([lesson[0] for lesson in lessons]).mean(0)
    expected: dict[str, torch.Tensor] = {
        "hard_loss": their_loss(task, logits, batch),
        "soft_loss": their_soft(name, logits, told, batch, 3.0),
        "hidden_loss": sum(their_hidden(hidden, one[1], p) for one, p in zip(lessons, projections, strict=True)) / 2,  # type: ignore[dict-item]
        "relation_loss": sum(their_relations(projected, one[2], 4, 0) for one in lessons) / 2,  # type: ignore[dict-item]
    }
    before = [each.grad.clone() for each in projections[1].parameters()]  # type: ignore[union-attr]
    projections[1].zero_grad()  # type: ignore[union-attr]
    whole = sum(weight * expected[loss] for loss, weight in zip(expected, WEIGHTS.values(), strict=True))
    whole.backward()  # type: ignore[union-attr]
    for loss, value in expected.items():
        assert float(output.metrics[loss]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), loss
        assert float(value) > 1e-4, loss
    assert float(output.loss) == pytest.approx(float(whole), rel=BOUND)
    same_gradients(without_projections(model), theirs, BOUND)
    largest = max(float(each.grad.abs().max()) for each in theirs.parameters() if each.grad is not None)
    for mine, parameter in zip(before, projections[1].parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(mine, parameter.grad, rtol=0, atol=BOUND * largest)


def without_projections(model: torch.nn.Module) -> torch.nn.Module:
    delattr(model, PROJECTIONS)
    return model


@pytest.mark.parametrize("name", TASKS_OF_LOGITS)
def test_losses_are_shares_of_the_global_batch(tmp_path: Path, name: str) -> None:
    task = make_taught(tmp_path, name, (LARGER,), **WEIGHTS)
    model = wide(task)
    whole = task.step(model, global_batch(task))
    parts = islice(training_batches(task.train_source(), BatchLayout(8, 2), Cursor(), workers=0), 4)
    outputs = [task.step(model, part) for part in parts]
    assert sum(float(one.loss) for one in outputs) == pytest.approx(float(whole.loss), rel=1e-5)
    assert whole.metrics.keys() >= {"hard_loss", "soft_loss", "hidden_loss", "relation_loss"}
    for metric, share in whole.metrics.items():
        assert sum(float(one.metrics[metric]) for one in outputs) == pytest.approx(float(share), rel=1e-4, abs=1e-7)


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path: Path) -> None:
    """And it stays in evaluation mode without gradients, no part of the model."""
    task = make_taught(tmp_path, "sequence_classification", hard=0.0, hidden=1.0, relations=1.0)
    model = wide(task)
    teacher = task.distillation._models[0][0]
    teacher.load_state_dict(model.state_dict())
    output = task.step(model, global_batch(task))
    assert float(output.loss) == pytest.approx(0.0, abs=1e-6)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(parameter is own for parameter in teacher.parameters() for own in model.parameters())


def test_recomputation_changes_nothing(tmp_path: Path) -> None:
    task = make_taught(tmp_path, "token_classification", (LARGER,), **WEIGHTS)
    found: list[Any] = []
    for recomputed in (False, True):
        task.config.model.activation_checkpointing = recomputed
        torch.manual_seed(1)
        model = task.build_model().train()
        output = task.step(model, global_batch(task))
        output.loss.backward()
        found.append([output.loss, *(each.grad for each in model.parameters() if each.grad is not None)])
    assert len(found[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_layers_are_spread_evenly() -> None:
    assert layer_pairs(4, 12) == {0: 2, 1: 5, 2: 8, 3: 11}
    assert layer_pairs(3, 3) == {0: 0, 1: 1, 2: 2}
    assert layer_pairs(3, 2) == {0: 0, 1: 1, 2: 1}
