"""Which layers stay float, on a graph of which one layer alone suffers from int8."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from engine.compress.quantise.calibrate import Ranges
from engine.compress.quantise.convert import Converter
from engine.compress.quantise.graph import layers_of, prepared, session_of
from engine.compress.quantise.machine import saturates
from engine.compress.quantise.search import Budget, Search
from engine.compress.score import Score
from engine.tasks.outcomes import Outcomes
from engine.tasks.significance import Difference
from tests.compress.quantise.graphs import chain, decided, feeds

EXAMPLES = 150
METHODS = ("dynamic", "minmax", "entropy", "percentile")


def search_of(tmp_path_factory: pytest.TempPathFactory, wild: int | None, budget: Budget) -> Search:
    """A search that scores agreement with the float graph."""
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(chain(6, wild), path)
    model = prepared(path)
    layers, examples = layers_of(model), feeds(EXAMPLES, seed=9)
    truth = decided(session_of(model, 1), examples)

    def scored(session: Any) -> Score:
        right = (decided(session, examples) == truth).astype(np.float64)[:, None]
        return Score("accuracy", Outcomes(tuple(map(str, truth)), {"accuracy": right}))

    converter = Converter(model, layers, saturates(), Ranges(model, layers, feeds(32), 1))
    before = scored(session_of(model, 1))
    return Search(converter, feeds(16, seed=4), 1, scored, before, budget, lambda line: None)


def test_all_layers_are_int8_where_none_suffers(tmp_path_factory: pytest.TempPathFactory) -> None:
    search = search_of(tmp_path_factory, None, Budget(10.0))
    chosen = search.run(METHODS)
    assert chosen.kept == ()
    assert set(search.distances) == set(METHODS)
    assert search.sensitivities == {}
    assert len(search.tried) == 2  # dynamic, and the best of those that were calibrated
    assert chosen.change.low >= -0.1


def test_the_layer_that_suffers_stays_float(tmp_path_factory: pytest.TempPathFactory) -> None:
    search = search_of(tmp_path_factory, 3, Budget(10.0))
    chosen = search.run(["dynamic"])
    assert not search.budget.holds(search.tried[0].change)
    assert [layer.label for layer in chosen.kept] == ["layer.3.dense"]
    worst = max(search.sensitivities, key=search.sensitivities.__getitem__)
    assert worst is chosen.kept[0]
    assert search.budget.holds(chosen.change)


def test_a_budget_that_nothing_keeps_to_leaves_all_float(tmp_path_factory: pytest.TempPathFactory) -> None:
    search = search_of(tmp_path_factory, 3, Budget(0.001, certain=False))
    chosen = search.run(["dynamic"])
    assert chosen.change.value == 0.0
    assert len(chosen.kept) >= 1


@pytest.mark.parametrize(
    ("low", "value", "certain", "holds"),
    [
        (-0.02, -0.005, True, False),
        (-0.02, -0.005, False, True),
        (-0.009, -0.005, True, True),
        (-0.02, -0.011, False, False),
    ],
)
def test_a_budget_is_of_the_interval_or_of_the_value(low: float, value: float, certain: bool, holds: bool) -> None:
    assert Budget(1.0, certain).holds(Difference(value, low, 0.0, 0.5)) is holds
