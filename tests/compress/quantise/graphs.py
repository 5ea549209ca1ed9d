"""A graph made by hand: embeddings, then products one after the other, each with its bias and a tanh."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engine.compress.quantise.graph import Feed

WORDS, WIDTH, CLASSES, LENGTH = 2000, 64, 4, 8


def chain(products: int, wild: int | None = None) -> Any:
    """The graph, whose last product gives the logits of classes.

    Args:
        wild: the product whose input has one value that is some hundred times as large as the others, and is not used.
    """
    generator = np.random.default_rng(3)
    nodes = [helper.make_node("Gather", ["words.weight", "input_ids"], ["states0"], "node_words")]
    constants = {"words.weight": generator.normal(size=(WORDS, WIDTH))}
    for index in range(products):
        last = index == products - 1
        weight = generator.normal(size=(WIDTH, CLASSES if last else WIDTH)) / np.sqrt(WIDTH)
        states = f"states{index}"
        if index == wild:
            constants["far"] = np.eye(WIDTH)[0] * 900.0
            weight[0] = 0.0
            nodes.append(helper.make_node("Add", [states, "far"], ["wild"], "node_wild"))
            states = "wild"
        name = f"layer.{index}.dense"
        constants |= {f"val_{index}": weight, f"{name}.bias": generator.normal(size=weight.shape[1]) / 10}
        nodes.append(helper.make_node("MatMul", [states, f"val_{index}"], [f"product{index}"], f"node_{index}"))
        nodes.append(helper.make_node("Add", [f"product{index}", f"{name}.bias"], [f"sum{index}"]))
        after = f"states{index + 1}"
        nodes.append(helper.make_node("ReduceMean" if last else "Tanh", [f"sum{index}"], ["logits" if last else after]))
    nodes[-1].attribute.extend([helper.make_attribute("keepdims", 0)])
    nodes[-1].input.append("axes")
    tensors = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in constants.items()]
    tensors.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    given = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "chain", [given], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def feeds(count: int, seed: int = 0) -> list[Feed]:
    """Samples of one sequence each."""
    generator = np.random.default_rng(seed)
    return [{"input_ids": generator.integers(0, WORDS, (1, LENGTH))} for _ in range(count)]


def decided(session: Any, samples: list[Feed]) -> NDArray[np.int64]:
    """The class of each sample."""
    return np.array([session.run(None, feed)[0].argmax() for feed in samples])
