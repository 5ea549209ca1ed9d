"""int8 graphs, whole and mixed, against the float graph that they are made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from engine.compress.quantise.calibrate import Ranges
from engine.compress.quantise.convert import ACTIVATIONS, Activations, Converter
from engine.compress.quantise.graph import distance, layers_of, outputs_of, prepared, rows_to_int8, session_of
from engine.compress.quantise.machine import processor, saturates
from tests.compress.quantise.graphs import WIDTH, WORDS, chain, feeds


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Converter:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(chain(4), path)
    model = prepared(path)
    layers = layers_of(model)
    return Converter(model, layers, saturates(), Ranges(model, layers, feeds(24), 1))


def test_layers_have_the_names_of_parameters(converter: Converter) -> None:
    labels = [(layer.label, layer.table, layer.shape) for layer in converter.layers]
    assert labels[0] == ("words", True, (WORDS, WIDTH))
    assert labels[1] == ("layer.0.dense", False, (WIDTH, WIDTH))
    assert len(labels) == 5


def test_nodes_without_names_get_some(tmp_path: Path) -> None:
    model = chain(2)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "model.onnx")
    layers = layers_of(prepared(tmp_path / "model.onnx"))
    assert [layer.label for layer in layers] == ["words", "layer.0.dense", "layer.1.dense"]
    assert len({layer.node for layer in layers}) == 3


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_int8_is_near_float_and_smaller(converter: Converter, activations: Activations) -> None:
    samples = feeds(24, seed=1)
    reference = outputs_of(session_of(converter.model, 1), samples)
    whole = converter.whole(activations)
    assert 0 < distance(reference, outputs_of(session_of(whole, 1), samples)) < 0.1
    kinds = Counter(node.op_type for node in whole.graph.node)
    assert kinds["MatMulInteger" if activations == "dynamic" else "DequantizeLinear"] >= 4
    assert len(whole.SerializeToString()) < 0.35 * len(converter.model.SerializeToString())


@pytest.mark.parametrize("activations", ["dynamic", "minmax"])
def test_layers_that_are_kept_compute_what_they_did(converter: Converter, activations: Activations) -> None:
    samples = feeds(8, seed=2)
    reference = outputs_of(session_of(converter.model, 1), samples)
    everything = converter.mixed(activations, converter.layers)
    assert np.array_equal(outputs_of(session_of(everything, 1), samples), reference)
    whole = outputs_of(session_of(converter.whole(activations), 1), samples)
    assert np.array_equal(outputs_of(session_of(converter.mixed(activations, []), 1), samples), whole)
    kept = converter.layers[2]
    mixed = converter.mixed(activations, [kept])
    onnx.checker.check_model(mixed)
    restored = next(node for node in mixed.graph.node if node.name == kept.node)
    assert restored == next(node for node in converter.model.graph.node if node.name == kept.node)
    found = outputs_of(session_of(mixed, 1), samples)
    assert not np.array_equal(found, whole)
    assert distance(reference, found) < 0.1


def test_a_row_of_a_table_is_off_by_half_its_scale() -> None:
    table = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32) * np.logspace(-3, 3, 50)[:, None]
    table[7] = 0.0
    bytes_, scales = rows_to_int8(table.astype(np.float32))
    assert bytes_.dtype == np.int8
    assert (np.abs(bytes_ * scales - table) <= scales * 0.5001).all()
    assert (bytes_[7] == 0).all()


def test_sums_of_bytes_are_exact_here_with_the_bits_that_are_chosen(tmp_path: Path) -> None:
    """The largest products that there are: all weights of one size, and inputs that become 255."""
    model = chain(1)
    for each in model.graph.initializer:
        if each.name in ("val_0", "words.weight"):
            largest = np.ones(tuple(each.dims), np.float32)
            each.CopyFrom(onnx.numpy_helper.from_array(largest, each.name))
    onnx.save(model, tmp_path / "model.onnx")
    graph = prepared(tmp_path / "model.onnx")
    layers, samples = layers_of(graph), feeds(4)
    reference = outputs_of(session_of(graph, 1), samples)
    for reduced in {True, saturates()}:
        found = outputs_of(session_of(Converter(graph, layers, reduced, None).whole("dynamic"), 1), samples)
        assert distance(reference, found) < 0.01
    if saturates():
        found = outputs_of(session_of(Converter(graph, layers, False, None).whole("dynamic"), 1), samples)
        assert distance(reference, found) > 0.1
    assert processor()
