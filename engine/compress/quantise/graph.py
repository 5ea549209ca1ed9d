"""The layers of an ONNX graph that can be int8: products with constant matrices, and tables of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.onnx.module import open_session

#: of a node, the input with its weights
PRODUCTS = ("MatMul", "Attention")
TABLES = ("Gather",)
#: tables with fewer numbers aren't worth the time that it takes to compute them back
SMALLEST_TABLE = 100_000

#: the inputs of a graph by name
Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Layer:
    """A node whose weights can be int8."""

    node: str
    """its name in the graph"""
    label: str
    """what a user knows it by: that of the model's parameter, as far as the graph still tells"""
    shape: tuple[int, ...]
    """of its weights"""
    table: bool
    """whether it is one of embeddings"""

    @property
    def numbers(self) -> int:
        """Of its weights."""
        return int(np.prod(self.shape))


def prepared(path: Path) -> Any:
    """The ONNX model of a file, as the quantisers of onnxruntime need it.

    A product and a sum are in the place of each Gemm, nodes have names, and tensors that a product reads or makes have
    their type, which nobody infers behind onnxruntime's own operators.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(onnx.load(path))
    model.replace_gemm_with_matmul()
    for index, node in enumerate(model.model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    graph = model.model.graph
    own = {each.name for each in (*graph.initializer, *graph.input, *graph.output)}
    del graph.value_info[:]
    for name in dict.fromkeys(
        name for node in graph.node if node.op_type in PRODUCTS for name in (*node.input, *node.output)
    ):
        if name and name not in own:
            graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model.model


def layers_of(model: Any) -> list[Layer]:
    """The layers of a model that is `prepared`, in the order of its nodes."""
    graph = model.graph
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        place = 0 if node.op_type in TABLES else 1
        if node.op_type not in PRODUCTS + TABLES or len(node.input) <= place or node.input[place] not in shapes:
            continue
        shape, table = shapes[node.input[place]], node.op_type in TABLES
        if len(shape) == 2 and (not table or (np.prod(shape) >= SMALLEST_TABLE and _axis(node) == 0)):
            found.append(Layer(node.name, _label(node, place, readers, shapes), shape, table))
    return found


def _axis(node: Any) -> int:
    return next((each.i for each in node.attribute if each.name == "axis"), 0)


def _label(node: Any, place: int, readers: Mapping[str, Sequence[Any]], shapes: Mapping[str, Any]) -> str:
    """The parameter's name, which folding may have taken from the weight and left at the bias that is added next."""
    after = [name for reader in readers.get(node.output[0], ()) for name in reader.input if name in shapes]
    for name in (node.input[place], *node.input[place + 1 :], *after):
        module, _, kind = name.rpartition(".")
        if module and kind in ("weight", "bias"):
            return str(module)
    return str(node.name)


def with_int8_tables(model: Any, layers: Sequence[Layer]) -> None:
    """Keep tables of embeddings as bytes with a scale a row, and compute back the rows that are read.

    A row's largest number is 127 times its scale, so the error of a number is at most half a scale. One scale for a
    whole table, as onnxruntime.quantization has it, would be that of its largest row.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    weights = {each.name: each for each in graph.initializer}
    chosen = {layer.node for layer in layers if layer.table}
    nodes: list[Any] = []
    done: set[str] = set()
    for node in graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        table, ids = node.input
        if table not in done:
            done.add(table)
            bytes_, scales = rows_to_int8(numpy_helper.to_array(weights[table]))
            graph.initializer.append(numpy_helper.from_array(bytes_, f"{table}_int8"))
            graph.initializer.append(numpy_helper.from_array(scales, f"{table}_scales"))
        row, scale, wide = (f"{node.name}_{part}" for part in ("row", "scale", "wide"))
        nodes += [
            helper.make_node("Gather", [f"{table}_int8", ids], [row], row, axis=0),
            helper.make_node("Gather", [f"{table}_scales", ids], [scale], scale, axis=0),
            helper.make_node("Cast", [row], [wide], wide, to=TensorProto.FLOAT),
            helper.make_node("Mul", [wide, scale], [node.output[0]], node.name),
        ]
    replace_all(graph.node, nodes)
    read = {name for node in graph.node for name in node.input}
    replace_all(graph.initializer, [each for each in graph.initializer if each.name not in done or each.name in read])


def replace_all(field: Any, values: Sequence[Any]) -> None:
    """Give a repeated field of a message other values."""
    kept = list(values)
    del field[:]
    field.extend(kept)


def rows_to_int8(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[V, H] as bytes [V, H] and scales [V, 1], whose products are nearest to it; rows of zeros have a scale of 1."""
    largest = np.abs(table).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    return np.rint(table / scales).astype(np.int8), scales


def session_of(model: Any, threads: int, outputs: Sequence[str] = ()) -> Any:
    """A session of an ONNX model in memory.

    Args:
        outputs: tensors inside of the graph to give beside the model's own outputs.
    """
    from onnx import ValueInfoProto

    own = len(model.graph.output)
    model.graph.output.extend([ValueInfoProto(name=name) for name in outputs])
    try:
        return open_session(model.SerializeToString(), torch.device("cpu"), threads)
    finally:
        del model.graph.output[own:]


def outputs_of(session: Any, feeds: Sequence[Feed]) -> NDArray[np.float32]:
    """All that a session gives for all feeds, end to end."""
    return np.concatenate([each.ravel() for feed in feeds for each in session.run(None, feed)]).astype(np.float32)


def distance(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """How far outputs are from those of the float model: the norm of the difference, relative to theirs."""
    return float(np.linalg.norm(other - reference) / np.linalg.norm(reference))
