"""A graph of a pruned model has neither the heads nor the neurons that are zeros, and computes the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.config import architecture_of
from engine.model.folder import tokenizer_files
from engine.model.pruning.units import sublayers
from engine.onnx.folder import GraphWish, Source, export_graph
from tests.model.pruning.tiny import config_of, widened
from tests.predict.models import write_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_graph_has_no_zeros_of_pruning(kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    config = config_of(kind, vocab_size=120)
    model = widened(architecture_of(config).build("sequence_classification", config, False))
    gone = 0
    for part in sublayers(model):
        removed = torch.arange(part.count) % 4 < 2 + part.layer % 2
        part.zero(removed)
        layers = [*part.inputs.values(), part.output]
        columns = int(removed.sum()) * part.width
        gone += sum(layer.weight.numel() // part.columns * columns for layer in layers)
    source = Source(model, "sequence_classification", tokenizer_files(tmp_path / "tokenizer"), {})
    export_graph(source, tmp_path / "graph", GraphWish())
    import onnx

    tensors = onnx.load(tmp_path / "graph" / "model.onnx").graph.initializer
    weights = (tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1)
    held = sum(math.prod(tensor.dims) for tensor in weights)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    print(f"{kind}: {held} elements of matrices of {matrices}, of which {gone} are of zeros")
    assert held == matrices - gone
